"""Tokens of one choice as the API reports them: text, log-probabilities and ids."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from bc2_jax.infer.text import TextStream
from bc2_jax.serve.requests import TokenScore
from bc2_jax.tokenizer import Tokenizer

_SPACE = "\u2581"
# Stands for minus infinity, which JSON cannot represent.
_LEAST_LOG_PROB = -9999.0


@dataclasses.dataclass
class Piece:
    """New text of a choice."""

    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    """One per id, if log-probabilities were requested."""


class AnswerText:
    """The growing text of a choice, up to a stop text.

    Every token computed up to there is counted and scored, including the eos and the tokens of the stop text, which are
    not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._stream = TextStream(tokenizer.decode, stop)
        self._held = Piece()
        self._taken: list[str] = []
        self.tokens = 0
        """New tokens so far."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found; later tokens do not count."""
        return self._stream.stopped

    @property
    def text(self) -> str:
        return "".join(self._taken)

    def add(self, tokens: Iterable[int | TokenScore]) -> Piece | None:
        """New final text; None if there is none, in which case a later piece brings these tokens."""
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
        self._held.text += self._stream.finish()
        return self._take()

    def _take(self) -> Piece:
        taken, self._held = self._held, Piece()
        self._taken.append(taken.text)
        return taken


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Unique spelling of a token in lists of tokens.

    A byte of a character is `<0xE4>`, a special token its name; an id without a piece is `<token_64010>`.
    """
    if token_id >= tokenizer.vocab_size:
        return f"<token_{token_id}>"
    return tokenizer.piece(token_id).replace(_SPACE, " ")


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """UTF-8 bytes that a token adds to the text; empty for a special token."""
    if token_id >= tokenizer.vocab_size or tokenizer.is_special(token_id):
        return b""
    text = token_text(tokenizer, token_id)
    return bytes([int(text[1:-1], 16)]) if tokenizer.is_byte(token_id) else text.encode()


def chat_log_probs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """`logprobs` of a chat; `bytes` is null for a token without text."""

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
    """`logprobs` of one choice of a completion, piece by piece, with token offsets in characters.

    A token in the middle of a character has that character's offset.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # One character per invalid byte, as in the text.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._offset = 0

    def lists(self, ids: Sequence[int], scores: Sequence[TokenScore | None]) -> dict[str, Any]:
        """Tokens, their log-probabilities, the most likely tokens and offsets; null for tokens that were not scored.

        The most likely tokens include the token itself and at most n others.
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
