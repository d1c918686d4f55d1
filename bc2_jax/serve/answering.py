"""From engine events to updates of one reply: submits the requests, merges their events, ends choices at stop texts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NamedTuple

from bc2_jax.serve.answers import AnswerText, Piece
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.prompts import Asked
from bc2_jax.serve.replies import Choice
from bc2_jax.serve.requests import (
    Ended,
    Event,
    Failed,
    Handle,
    NotReady,
    PromptScored,
    QueueFull,
    Started,
    Tokens,
    TokenScore,
)
from bc2_jax.serve.schema import Options
from bc2_jax.serve.service import Service
from bc2_jax.tokenizer import Tokenizer

_TICK_S = 0.5
_MOST_UNREAD = 64
"""Events taken from the handles before the client reads them; the rest stays in the handles, which are bounded too."""
RETRY_AFTER_S: Mapping[str, int] = {"loading": 10, "draining": 30}


def not_ready(state: str) -> ApiError:
    """The error while the engine is not ready."""
    retry_after = RETRY_AFTER_S.get(state, 30)
    return ApiError(503, f"the server is {state}; try again later.", code="not_ready", retry_after=retry_after)


class Queued(NamedTuple):
    """No new text for a while."""

    place: int | None  # number of requests ahead in the queue; None if the prompt is being read
    is_started: bool


class Begun(NamedTuple):
    """The prompt of a choice has been read."""

    choice: int
    prompt_scores: Sequence[TokenScore | None] | None


class New(NamedTuple):
    """New text of a choice."""

    choice: int
    piece: Piece


class Done(NamedTuple):
    """A choice is complete."""

    choice: int
    piece: Piece
    reason: str


Update = Queued | Begun | New | Done


class Answering:
    """The engine requests of one reply, `n` per prompt.

    Those of the first prompt are accepted or the reply is refused; the others are submitted as the queue has room, so a
    reply may have more prompts than the queue has places. A stop text ends a choice here and cancels its request.
    """

    def __init__(self, service: Service, asked: Asked, options: Options, tokenizer: Tokenizer):
        self._service, self._asked, self._options = service, asked, options
        requests, n = asked.requests, asked.n
        self._left = deque(requests[i : i + n] for i in range(0, len(requests), n))
        self._handles: list[Handle] = []
        self._readers: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(_MOST_UNREAD)
        self._texts = [AnswerText(tokenizer, options.stop) for _ in requests]
        self._started: set[int] = set()
        self._done: set[int] = set()
        self.cached_tokens = 0
        """Prompt tokens found in the cache, each prompt counted once."""

    @property
    def new_tokens(self) -> int:
        return sum(text.tokens for text in self._texts)

    @property
    def texts(self) -> list[str]:
        return [text.text for text in self._texts]

    def start(self) -> None:
        """Submits the first prompt; raises ApiError if the queue is full or the engine not ready."""
        try:
            self._submit()
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from error

    def close(self) -> None:
        """Cancels the requests that are still running."""
        self._left.clear()
        for handle in self._handles:
            handle.cancel()
        for reader in self._readers:
            reader.cancel()

    async def updates(self) -> AsyncIterator[Update]:
        """Updates until the last choice is complete, `Queued` about twice a second while there are none.

        Raises ApiError if the engine fails or ends a request by itself.
        """
        yield self._queued()
        while len(self._done) < len(self._texts):
            self._submit_left()
            try:
                async with asyncio.timeout(_TICK_S):
                    index, event = await self._events.get()
            except TimeoutError:
                # A dying engine reports to every request; this is for a request that it could not reach.
                if self._service.state == "dead" and self._events.empty():
                    raise ApiError(500, "the engine has failed.", code="engine_failed") from None
                yield self._queued()
                continue
            for update in self._read(index, event):
                yield update

    def _submit(self) -> None:
        try:
            handles = self._service.submit_all(self._left[0])
        except NotReady as error:
            raise not_ready(error.state) from error
        self._left.popleft()
        for handle in handles:
            index = len(self._handles)
            self._handles.append(handle)
            self._readers.append(asyncio.create_task(self._forward(index, handle)))

    def _submit_left(self) -> None:
        while self._left:
            try:
                self._submit()
            except QueueFull:
                return

    async def _forward(self, index: int, handle: Handle) -> None:
        async for event in handle:
            if isinstance(event, Started):
                self._started.add(index)
            await self._events.put((index, event))

    def _queued(self) -> Queued:
        waiting = [handle for i, handle in enumerate(self._handles) if i not in self._started]
        places = [place for handle in waiting if (place := self._service.queue_place(handle)) is not None]
        return Queued(min(places, default=None), bool(self._started))

    def _read(self, index: int, event: Event) -> list[Update]:
        if index in self._done:
            return []
        match event:
            case Started():
                if index % self._asked.n == 0:
                    self.cached_tokens += event.cached_tokens
                is_scored = self._asked.requests[0].prompt_log_probs is not None
                return [] if is_scored else [Begun(index, None)]
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

    def _add(self, index: int, event: Tokens) -> list[Update]:
        if self._options.max_tokens == 0:
            return []
        text = self._texts[index]
        piece = text.add(event.tokens)
        updates: list[Update] = [] if piece is None else [New(index, piece)]
        if text.stopped:
            self._handles[index].cancel()
            updates.append(self._end(index, "stopped"))
        return updates

    def _end(self, index: int, reason: str) -> Done:
        self._done.add(index)
        text = self._texts[index]
        piece = text.finish()  # may complete a stop text
        return Done(index, piece, "stopped" if text.stopped else "length" if self._options.max_tokens == 0 else reason)


async def collect(answering: Answering) -> list[Choice]:
    """All choices once they are complete; raises ApiError as `updates`."""
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
