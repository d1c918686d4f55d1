"""The engine's requests behind one reply of the API: handed in, their events merged, cancelled together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.requests import Ended, Event, Failed, Handle, NotReady, QueueFull, Request, Started
from bc2_jax.serve.stats import Stats

_TICK_S = 0.5
_MOST_UNREAD = 64
"""Events that are taken from the handles before a client has read them; what is more stays with the handles, which
have a bound of their own."""
RETRY_AFTER_S: Mapping[str, int] = {"loading": 10, "draining": 30}


class Serves(Protocol):
    """What is needed of a `Service`."""

    @property
    def state(self) -> str: ...

    @property
    def is_healthy(self) -> bool: ...

    def stats(self) -> Stats: ...

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]: ...

    def queue_place(self, handle: Handle) -> int | None: ...

    def drain(self, timeout: float | None = None) -> bool: ...

    def stop(self, timeout: float | None = None) -> bool: ...


def not_ready(state: str) -> ApiError:
    """The error while there is no engine to ask."""
    retry_after = RETRY_AFTER_S.get(state, 30)
    return ApiError(503, f"the server is {state}; try again later.", code="not_ready", retry_after=retry_after)


class Exchange:
    """Requests for several prompts, `n` for each. Those of the first are accepted, or the reply is refused; others are
    handed in as the queue has room for them, so that a reply may have more prompts than the queue has places."""

    def __init__(self, service: Serves, requests: Sequence[Request], n: int):
        self._service = service
        self._left = deque(requests[i : i + n] for i in range(0, len(requests), n))
        self._handles: list[Handle] = []
        self._readers: list[asyncio.Task[None]] = []
        self._started: set[int] = set()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(_MOST_UNREAD)

    def start(self) -> None:
        """Hands in the first prompt; raises ApiError if the queue is full or the engine not ready."""
        try:
            self._submit()
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from error

    def _submit(self) -> None:
        try:
            handles = self._service.submit_all(self._left[0])
        except NotReady as error:
            raise not_ready(error.state) from error
        self._left.popleft()
        for handle in handles:
            index = len(self._handles)
            self._handles.append(handle)
            self._readers.append(asyncio.create_task(self._read(index, handle)))

    async def _read(self, index: int, handle: Handle) -> None:
        async for event in handle:
            if isinstance(event, Started):
                self._started.add(index)
            await self._events.put((index, event))

    def _submit_left(self) -> None:
        while self._left:
            try:
                self._submit()
            except QueueFull:
                return

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """The events of all, each with the place of its request; None about twice a second while there is none.

        Ends after the last event of the last request. Raises ApiError if the engine goes away.
        """
        open_requests = len(self._handles) + sum(map(len, self._left))
        while open_requests:
            if self._left:
                self._submit_left()
            try:
                async with asyncio.timeout(_TICK_S):
                    index, event = await self._events.get()
            except TimeoutError:
                # The engine reports to every request before it stops; this is for one that could not.
                if self._service.state == "dead" and self._events.empty():
                    raise ApiError(500, "the engine has failed.", code="engine_failed") from None
                yield None
                continue
            open_requests -= isinstance(event, Ended | Failed)
            yield index, event

    @property
    def queue_place(self) -> int | None:
        """How many requests are before the first of these that waits for a row; None if none of them waits."""
        waiting = [handle for i, handle in enumerate(self._handles) if i not in self._started]
        places = [place for handle in waiting if (place := self._service.queue_place(handle)) is not None]
        return min(places, default=None)

    @property
    def is_started(self) -> bool:
        """Whether the prompt of any request has been read."""
        return bool(self._started)

    def cancel(self, index: int) -> None:
        """Frees what one request holds; its last event still comes."""
        self._handles[index].cancel()

    def close(self) -> None:
        """Cancels what is still running; no more events come."""
        self._left.clear()
        for handle in self._handles:
            handle.cancel()
        for reader in self._readers:
            reader.cancel()
