"""Bodies and stream chunks of chats and completions, as typed by OpenAI's clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bc2_jax.serve.answers import CompletionLogProbs, Piece, chat_log_probs
from bc2_jax.serve.prompts import Asked, ServedModel
from bc2_jax.serve.requests import TokenScore
from bc2_jax.serve.schema import Options

_FINISH_REASONS = {None: None, "eos": "stop", "stopped": "stop", "length": "length"}
Json = dict[str, Any]
PromptScores = Sequence[TokenScore | None] | None


@dataclasses.dataclass(frozen=True)
class Heading:
    """Fields shared by all bodies and chunks of one reply."""

    id: str
    created: int
    model: str
    fingerprint: str
    seed: int

    def json(self, kind: str) -> Json:
        """Its fields; `kind` is the object type."""
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "seed": self.seed,
        }  # fmt: skip


@dataclasses.dataclass
class Choice:
    """A complete choice."""

    pieces: list[Piece]
    reason: str
    prompt_scores: PromptScores = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> list[int]:
        return [i for piece in self.pieces for i in piece.ids]


def usage_of(asked: Asked, new_tokens: int, cached_tokens: int) -> Json:
    """Tokens of each prompt once, and of all choices; `dropped_rounds` of a chat is an extension."""
    usage: Json = {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": asked.prompt_tokens + new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    return usage if asked.dropped_rounds is None else usage | {"dropped_rounds": asked.dropped_rounds}


class _Writer:
    """Common part of both writers; each chunk is a dict for one `data:` line."""

    chunk_kind = whole_kind = ""

    def __init__(self, model: ServedModel, heading: Heading, asked: Asked, options: Options):
        self._tokenizer, self._heading, self._asked, self._options = model.tokenizer, heading, asked, options

    def usage(self, usage: Json) -> Json:
        """The chunk without choices."""
        return self._heading.json(self.chunk_kind) | {"choices": [], "usage": usage}

    def _body(self, choices: Sequence[Json], usage: Json) -> Json:
        return self._heading.json(self.whole_kind) | {"choices": choices, "usage": usage}

    def _chunk(self, choice: Json) -> Json:
        return self._heading.json(self.chunk_kind) | {"choices": [choice], "usage": None}

    def _ids(self, ids: Sequence[int], index: int | None = None) -> Json:
        """The extension `token_ids`; with `index`, that of a complete choice, also the ids of its prompt."""
        if not self._options.has_token_ids:
            return {}
        prompt = {} if index is None else {"prompt_token_ids": self._asked.prompts[index // self._asked.n]}
        return {"token_ids": list(ids)} | prompt


class ChatWriter(_Writer):
    """Replies of /v1/chat/completions."""

    chunk_kind, whole_kind = "chat.completion.chunk", "chat.completion"

    def start(self, index: int, prompt_scores: PromptScores) -> list[Json]:
        """The first chunk of a choice."""
        return [self._delta(index, {"role": "assistant", "content": ""}, Piece())]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        """New text of a choice."""
        return [self._delta(index, {"content": piece.text}, piece)]

    def last(self, index: int, piece: Piece, reason: str) -> list[Json]:
        """The rest of a choice and its finish reason."""
        if piece.text:
            return [*self.piece(index, piece), self._delta(index, {}, Piece(), reason)]
        return [self._delta(index, {}, piece, reason)]

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """The body of a reply that is not streamed."""
        found = []
        for index, choice in enumerate(choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            scores = [score for piece in choice.pieces for score in piece.scores]
            found.append(
                {"index": index, "message": message, "logprobs": self._log_probs(scores, True)}
                | {"finish_reason": _FINISH_REASONS[choice.reason]}
                | self._ids(choice.ids, index)
            )
        return self._body(found, usage)

    def _delta(self, index: int, delta: Mapping[str, Any], piece: Piece, reason: str | None = None) -> Json:
        choice = {
            "index": index, "delta": delta, "logprobs": self._log_probs(piece.scores, bool(piece.ids)),
            "finish_reason": _FINISH_REASONS[reason],
        }  # fmt: skip
        return self._chunk(choice | self._ids(piece.ids))

    def _log_probs(self, scores: Sequence[TokenScore], has_tokens: bool) -> Json | None:
        return chat_log_probs(self._tokenizer, scores) if self._options.log_probs is not None and has_tokens else None


class CompletionWriter(_Writer):
    """Replies of /v1/completions."""

    chunk_kind = whole_kind = "text_completion"

    def __init__(self, model: ServedModel, heading: Heading, asked: Asked, options: Options):
        super().__init__(model, heading, asked, options)
        self._log_probs = [CompletionLogProbs(model.tokenizer) for _ in asked.requests]

    def start(self, index: int, prompt_scores: PromptScores) -> list[Json]:
        """The prompt, if it is echoed."""
        if not self._asked.echoes:
            return []
        text = self._asked.echoes[index // self._asked.n]
        return [self._chunk(self._choice(index, text, self._prompt_lists(index, prompt_scores), self._ids(())))]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        return self.last(index, piece, None)

    def last(self, index: int, piece: Piece, reason: str | None) -> list[Json]:
        lists = self._lists(index, piece)
        return [self._chunk(self._choice(index, piece.text, lists, self._ids(piece.ids), reason))]

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        found = []
        for index, choice in enumerate(choices):
            echo = self._asked.echoes[index // self._asked.n] if self._asked.echoes else ""
            lists = [self._prompt_lists(index, choice.prompt_scores)] if self._asked.echoes else []
            lists += [self._lists(index, piece) for piece in choice.pieces]
            ids = self._ids(choice.ids, index)
            found.append(self._choice(index, echo + choice.text, _join(lists), ids, choice.reason))
        return self._body(found, usage)

    def _prompt_lists(self, index: int, scores: PromptScores) -> Json | None:
        if self._options.log_probs is None:
            return None
        ids = self._asked.prompts[index // self._asked.n]
        return self._log_probs[index].lists(ids, scores if scores is not None else [None] * len(ids))

    def _lists(self, index: int, piece: Piece) -> Json | None:
        return None if self._options.log_probs is None else self._log_probs[index].lists(piece.ids, piece.scores)

    def _choice(self, index: int, text: str, log_probs: Json | None, ids: Json, reason: str | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": _FINISH_REASONS[reason]} | ids


Writer = ChatWriter | CompletionWriter


def _join(lists: Sequence[Json | None]) -> Json | None:
    """Several dicts of lists concatenated into one."""
    there = [one for one in lists if one is not None]
    if not there:
        return None
    return {name: [item for one in there for item in one[name]] for name in there[0]}
