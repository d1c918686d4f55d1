"""What a reply is made of, in the order in which it becomes known: the same for streams and whole bodies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from bc2_jax.serve.answers import AnswerText, Piece
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.exchange import Exchange
from bc2_jax.serve.prompts import Asked
from bc2_jax.serve.replies import Choice
from bc2_jax.serve.requests import Ended, Event, Failed, PromptScored, Started, Tokens, TokenScore
from bc2_jax.serve.schema import Options
from bc2_jax.tokenizer import Tokenizer


class Waiting(NamedTuple):
    """Nothing new for a while."""

    place: int | None
    """Requests before this one in the queue; None once its prompt is being read."""
    is_started: bool


class Begun(NamedTuple):
    """The prompt of a choice has been read."""

    choice: int
    prompt_scores: Sequence[TokenScore | None] | None


class New(NamedTuple):
    """Text of a choice."""

    choice: int
    piece: Piece


class Done(NamedTuple):
    """A choice is complete."""

    choice: int
    piece: Piece
    reason: str


Update = Waiting | Begun | New | Done


class Answering:
    """Turns the engine's events into updates; stop texts end a choice here, and its request is then cancelled."""

    def __init__(self, exchange: Exchange, asked: Asked, options: Options, tokenizer: Tokenizer):
        self._exchange, self._asked, self._options = exchange, asked, options
        self._texts = [AnswerText(tokenizer, options.stop) for _ in asked.requests]
        self._done: set[int] = set()
        self.cached_tokens = 0
        """Prompt tokens that were not computed, each prompt counted once."""

    @property
    def new_tokens(self) -> int:
        """Of all choices."""
        return sum(text.tokens for text in self._texts)

    @property
    def texts(self) -> list[str]:
        """What was said of each choice so far."""
        return [text.text for text in self._texts]

    async def updates(self) -> AsyncIterator[Update]:
        """Until the last choice is complete. Raises ApiError if the engine fails or ends a request by itself."""
        yield self._waiting()
        async for item in self._exchange.events():
            if item is None:
                yield self._waiting()
                continue
            for update in self._read(*item):
                yield update
            if len(self._done) == len(self._texts):
                return

    def _waiting(self) -> Waiting:
        return Waiting(self._exchange.queue_place, self._exchange.is_started)

    def _read(self, index: int, event: Event) -> list[Update]:
        if index in self._done:
            return []
        match event:
            case Started():
                if index % self._asked.n == 0:
                    self.cached_tokens += event.cached_tokens
                return [] if self._is_scored else [Begun(index, None)]
            case PromptScored():
                return [Begun(index, event.scores)]
            case Tokens():
                return self._add(index, event)
            case Failed():
                code = "engine_failed" if event.status == 500 else "timeout" if event.status == 504 else "not_served"
                retry_after = 1.0 if event.status == 503 else None
                raise ApiError(event.status, event.message, code=code, retry_after=retry_after)
            case Ended():
                if event.reason == "cancelled":
                    raise ApiError(503, "the server has ended the request.", code="cancelled", retry_after=1.0)
                return [self._end(index, event.reason)]

    @property
    def _is_scored(self) -> bool:
        return self._asked.requests[0].prompt_log_probs is not None

    def _add(self, index: int, event: Tokens) -> list[Update]:
        if self._options.max_tokens == 0:
            return []
        text = self._texts[index]
        piece = text.add(event.tokens)
        updates: list[Update] = [] if piece is None else [New(index, piece)]
        if text.stopped:
            self._exchange.cancel(index)
            updates.append(self._end(index, "stopped"))
        return updates

    def _end(self, index: int, reason: str) -> Done:
        self._done.add(index)
        text = self._texts[index]
        piece = text.finish()  # what was held back may complete a stop text
        return Done(index, piece, "stopped" if text.stopped else "length" if self._options.max_tokens == 0 else reason)


async def collect(answering: Answering) -> list[Choice]:
    """The choices, once they are complete; raises ApiError as `updates`."""
    choices: dict[int, Choice] = {}
    async for update in answering.updates():
        match update:
            case Begun():
                choices[update.choice] = Choice([], "", update.prompt_scores)
            case New():
                choices[update.choice].pieces.append(update.piece)
            case Done():
                choices[update.choice].pieces.append(update.piece)
                choices[update.choice].reason = update.reason
    return [choices[index] for index in sorted(choices)]
