"""Tokens of one choice as the API reports them: final text, log-probabilities, ids, and why it ended."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from bc2_jax.infer.text import TextStream
from bc2_jax.serve.requests import TokenScore
from bc2_jax.tokenizer import Tokenizer

_SPACE = "\u2581"
# What JSON cannot say: a token that has no probability.
_LEAST_LOG_PROB = -9999.0


@dataclasses.dataclass
class Piece:
    """What is new of a choice."""

    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    """One for each of `ids`, if log-probabilities were asked for."""


class AnswerText:
    """The text of a choice as it grows, up to a stop text.

    Every token that was computed up to there is counted and scored, the eos and the tokens of the stop text included;
    neither has a place in the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._stream = TextStream(tokenizer.decode, stop)
        self._held = Piece()
        self._taken: list[str] = []
        self.tokens = 0
        """New tokens so far."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found: no further token counts."""
        return self._stream.stopped

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self._taken)

    def add(self, tokens: Iterable[int | TokenScore]) -> Piece | None:
        """What is new and final; None while there is no new text, which a later piece then brings with its tokens."""
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            if isinstance(token, TokenScore):
                self._held.scores.append(token)
                token = token.id
            self._held.ids.append(token)
            self._held.text += self._stream.add(token)
        return self._take() if self._held.text else None

    def finish(self) -> Piece:
        """All that was held back."""
        self._held.text += self._stream.finish()
        return self._take()

    def _take(self) -> Piece:
        taken, self._held = self._held, Piece()
        self._taken.append(taken.text)
        return taken


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """How a token is written where tokens are listed: no two in the same way.

    A byte of a character is `<0xE4>`, a special token its name; an id without a piece is `<token_64010>`.
    """
    if token_id >= tokenizer.vocab_size:
        return f"<token_{token_id}>"
    return tokenizer.piece(token_id).replace(_SPACE, " ")


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds to the text in UTF-8; nothing for a special token."""
    if token_id >= tokenizer.vocab_size or tokenizer.is_special(token_id):
        return b""
    text = token_text(tokenizer, token_id)
    return bytes([int(text[1:-1], 16)]) if tokenizer.is_byte(token_id) else text.encode()


def chat_log_probs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """The `logprobs` of a chat; `bytes` is null for a token that has no text."""

    def entry(token_id: int, log_prob: float) -> dict[str, Any]:
        content = token_bytes(tokenizer, token_id)
        return {
            "token": token_text(tokenizer, token_id), "logprob": _finite(log_prob), "bytes": list(content) or None,
        }  # fmt: skip

    content = [
        entry(score.id, score.log_prob) | {"top_logprobs": [entry(*one) for one in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


class CompletionLogProbs:
    """The `logprobs` of one choice of a completion, piece by piece, the offsets of its tokens counted in characters.

    A token in the middle of a character has the offset of that character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # One character for each byte that is not UTF-8, as in the text.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._offset = 0

    def lists(self, ids: Sequence[int], scores: Sequence[TokenScore | None]) -> dict[str, Any]:
        """The lists of tokens, their log-probabilities, the most likely and offsets; null for what was not scored.

        The most likely hold the token itself too, with the same number, and n others at most.
        """
        text = [token_text(self._tokenizer, i) for i in ids]
        offsets = []
        for i in ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token_bytes(self._tokenizer, i)))
        return {
            "tokens": text,
            "token_logprobs": [None if score is None else _finite(score.log_prob) for score in scores],
            "top_logprobs": [None if score is None else self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        found = {token_text(self._tokenizer, i): _finite(log_prob) for i, log_prob in score.top}
        return found | {token_text(self._tokenizer, score.id): _finite(score.log_prob)}


def _finite(log_prob: float) -> float:
    return max(log_prob, _LEAST_LOG_PROB)
