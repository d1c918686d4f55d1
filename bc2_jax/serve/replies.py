"""The bodies and stream chunks of chats and completions, as the types of OpenAI's clients have them.

Both writers have the same methods; each chunk is a dict for one `data:` line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bc2_jax.serve.answers import CompletionLogProbs, Piece, chat_log_probs
from bc2_jax.serve.prompts import Asked, ServedModel
from bc2_jax.serve.requests import TokenScore
from bc2_jax.serve.schema import Options

FINISH_REASONS = {"eos": "stop", "stopped": "stop", "length": "length"}
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Heading:
    """What every body and chunk of one reply says."""

    id: str
    created: int
    model: str
    fingerprint: str
    seed: int

    def json(self, kind: str) -> Json:
        """Its fields; `kind` is the type of object."""
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "seed": self.seed,
        }  # fmt: skip


@dataclasses.dataclass
class Choice:
    """A choice that is complete."""

    pieces: list[Piece]
    reason: str
    prompt_scores: Sequence[TokenScore | None] | None = None


def usage_of(asked: Asked, new_tokens: int, cached_tokens: int) -> Json:
    """Tokens of each prompt once, and of all choices; `dropped_rounds` of a chat is an extension."""
    usage: Json = {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": asked.prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    return usage if asked.dropped_rounds is None else usage | {"dropped_rounds": asked.dropped_rounds}


class ChatWriter:
    """Replies of /v1/chat/completions."""

    def __init__(self, model: ServedModel, heading: Heading, asked: Asked, options: Options):
        self._tokenizer = model.tokenizer
        self._heading, self._asked, self._options = heading, asked, options

    def start(self, index: int, prompt_scores: Sequence[TokenScore | None] | None) -> list[Json]:
        """The first chunk of a choice."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, Piece())]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        """What is new of a choice."""
        return [self._chunk(index, {"content": piece.text}, piece)]

    def last(self, index: int, piece: Piece, reason: str) -> list[Json]:
        """The rest of a choice and why it ended."""
        if piece.text:
            return [*self.piece(index, piece), self._chunk(index, {}, Piece(), reason)]
        return [self._chunk(index, {}, piece, reason)]

    def usage(self, usage: Json) -> Json:
        """The chunk without choices."""
        return self._heading.json("chat.completion.chunk") | {"choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """The body of a reply that is not streamed."""
        found = []
        for index, choice in enumerate(choices):
            text = "".join(piece.text for piece in choice.pieces)
            ids = [i for piece in choice.pieces for i in piece.ids]
            message = {"role": "assistant", "content": text, "refusal": None}
            scores = [score for piece in choice.pieces for score in piece.scores]
            found.append(
                {"index": index, "message": message, "logprobs": self._log_probs(scores, True)}
                | {"finish_reason": FINISH_REASONS[choice.reason]}
                | self._ids(index, ids)
            )
        return self._heading.json("chat.completion") | {"choices": found, "usage": usage}

    def _chunk(self, index: int, delta: Mapping[str, Any], piece: Piece, reason: str | None = None) -> Json:
        choice = {
            "index": index, "delta": delta, "logprobs": self._log_probs(piece.scores, bool(piece.ids)),
            "finish_reason": None if reason is None else FINISH_REASONS[reason],
        }  # fmt: skip
        choice |= self._ids(None, piece.ids)
        return self._heading.json("chat.completion.chunk") | {"choices": [choice], "usage": None}

    def _log_probs(self, scores: Sequence[TokenScore], has_tokens: bool) -> Json | None:
        return chat_log_probs(self._tokenizer, scores) if self._options.log_probs is not None and has_tokens else None

    def _ids(self, index: int | None, ids: Sequence[int]) -> Json:
        """The extension `token_ids`; with those of the prompt for a whole choice."""
        if not self._options.has_token_ids:
            return {}
        prompt = {} if index is None else {"prompt_token_ids": self._asked.prompts[index // self._asked.n]}
        return {"token_ids": list(ids)} | prompt


class CompletionWriter:
    """Replies of /v1/completions."""

    def __init__(self, model: ServedModel, heading: Heading, asked: Asked, options: Options):
        self._model, self._heading, self._asked, self._options = model, heading, asked, options
        self._log_probs = [CompletionLogProbs(model.tokenizer) for _ in asked.requests]

    def start(self, index: int, prompt_scores: Sequence[TokenScore | None] | None) -> list[Json]:
        """The prompt, if it is to be repeated."""
        if not self._asked.echoes:
            return []
        text = self._asked.echoes[index // self._asked.n]
        return [self._chunk(index, text, self._prompt_lists(index, prompt_scores), self._ids(None, ()))]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        """What is new of a choice."""
        return [self._chunk(index, piece.text, self._lists(index, piece), self._ids(None, piece.ids))]

    def last(self, index: int, piece: Piece, reason: str) -> list[Json]:
        """The rest of a choice and why it ended."""
        return [self._chunk(index, piece.text, self._lists(index, piece), self._ids(None, piece.ids), reason)]

    def usage(self, usage: Json) -> Json:
        """The chunk without choices."""
        return self._heading.json("text_completion") | {"choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """The body of a reply that is not streamed."""
        found = []
        for index, choice in enumerate(choices):
            text = self._asked.echoes[index // self._asked.n] if self._asked.echoes else ""
            lists = [self._prompt_lists(index, choice.prompt_scores)] if self._asked.echoes else []
            lists += [self._lists(index, piece) for piece in choice.pieces]
            text += "".join(piece.text for piece in choice.pieces)
            ids = self._ids(index, [i for piece in choice.pieces for i in piece.ids])
            found.append(self._choice(index, text, _join(lists), ids, choice.reason))
        return self._heading.json("text_completion") | {"choices": found, "usage": usage}

    def _prompt_lists(self, index: int, scores: Sequence[TokenScore | None] | None) -> Json | None:
        if self._options.log_probs is None:
            return None
        ids = self._asked.prompts[index // self._asked.n]
        return self._log_probs[index].lists(ids, scores if scores is not None else [None] * len(ids))

    def _lists(self, index: int, piece: Piece) -> Json | None:
        return None if self._options.log_probs is None else self._log_probs[index].lists(piece.ids, piece.scores)

    def _ids(self, index: int | None, ids: Sequence[int]) -> Json:
        if not self._options.has_token_ids:
            return {}
        prompt = {} if index is None else {"prompt_token_ids": self._asked.prompts[index // self._asked.n]}
        return {"token_ids": list(ids)} | prompt

    def _chunk(self, index: int, text: str, log_probs: Json | None, ids: Json, reason: str | None = None) -> Json:
        choice = self._choice(index, text, log_probs, ids, reason)
        return self._heading.json("text_completion") | {"choices": [choice], "usage": None}

    def _choice(self, index: int, text: str, log_probs: Json | None, ids: Json, reason: str | None) -> Json:
        finish = None if reason is None else FINISH_REASONS[reason]
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish} | ids


Writer = ChatWriter | CompletionWriter


def _join(lists: Sequence[Json | None]) -> Json | None:
    """One set of lists of several, in their order."""
    there = [one for one in lists if one is not None]
    if not there:
        return None
    return {name: [item for one in there for item in one[name]] for name in there[0]}
