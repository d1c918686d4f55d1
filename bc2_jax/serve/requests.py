"""Requests to the engine, their events, and the handle between the engine thread and readers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal, NamedTuple

from bc2_jax.infer.settings import Settings


@dataclasses.dataclass(frozen=True)
class Request:
    """One continuation of one prompt; n choices are n requests with places 0 to n - 1."""

    ids: tuple[int, ...]  # the prompt: at least one id, all in the vocabulary
    settings: Settings  # as returned by `Settings.check`
    place: int = 0  # with the seed it determines the key of each draw, as a prompt's index does in `generate`
    top_log_probs: int | None = None
    """None: no log-probabilities; 0..20: those of each token and of that many likely tokens."""
    prompt_log_probs: int | None = None  # the same for each prompt token except the first
    owner: str = ""  # owners take turns in the queue and never share cached prefixes. Empty: anonymous.

    @property
    def reserved(self) -> int:
        """Tokens to reserve: prompt plus new tokens."""
        return len(self.ids) + self.settings.max_new_tokens


class TokenScore(NamedTuple):
    """A token with log-probabilities in nats: log_softmax of the model's fp32 logits."""

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]  # (id, log-probability) of the most likely tokens, the most likely first


@dataclasses.dataclass(frozen=True)
class Started:
    """The prompt has been read; the first event."""

    cached_tokens: int  # prompt tokens copied from another request's cache instead of computed
    seed: int


@dataclasses.dataclass(frozen=True)
class PromptScored:
    """Comes before the first token if the request has `prompt_log_probs`."""

    scores: list[TokenScore | None]  # one per prompt token; None for the first


@dataclasses.dataclass(frozen=True)
class Tokens:
    """New tokens, including the eos that ends the continuation."""

    tokens: list[int] | list[TokenScore]  # scores if the request has `top_log_probs`, else ids


@dataclasses.dataclass(frozen=True)
class Ended:
    """Last event of a request."""

    reason: Literal["eos", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Failed:
    """Last event of a request that could not be completed."""

    message: str
    status: int
    """500: the engine failed; 503: the server stops, or no row was free in time; 504: the request took too long."""


Event = Started | PromptScored | Tokens | Ended | Failed


class QueueFull(Exception):
    """The request was not accepted; retry after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class NotReady(Exception):
    """The service is not ready; `state` is loading, draining, stopped or dead."""

    def __init__(self, state: str):
        super().__init__(f"The service is {state}.")
        self.state = state


class Handle:
    """An accepted request and its events, for one reader.

    Read with `for event in handle` in a thread or `async for event in handle` in an event loop; both end after the last
    event. `put` never waits: a reader that leaves `capacity` events unread loses its request.
    """

    def __init__(self, request: Request, capacity: int, on_cancel: Callable[[Handle], None]):
        self.request = request
        self.submitted = time.monotonic()
        self._capacity, self._on_cancel = capacity, on_cancel
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self.is_complete = False  # whether the last event was put

    def cancel(self) -> None:
        """Requests the last event Ended("cancelled"). Callable from any thread, also repeatedly."""
        if not self.is_complete:
            self._on_cancel(self)

    def put(self, event: Event) -> bool:
        """Adds an event for the reader; returns False if too many are unread. Drops events after the last one."""
        is_last = isinstance(event, Ended | Failed)
        with self._changed:
            if self.is_complete:
                return True
            if len(self._events) >= self._capacity and not is_last:
                return False
            self.is_complete = is_last
            self._events.append(event)
            waiter, self._waiter = self._waiter, None
            self._changed.notify()
        if waiter is not None:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # the loop is closed, so there is no reader
                loop.call_soon_threadsafe(_resolve, future)
        return True

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                event = self._events.popleft()
            yield event
            if isinstance(event, Ended | Failed):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                event = self._events.popleft() if self._events else None
                if event is None:
                    future = loop.create_future()
                    self._waiter = (loop, future)
            if event is None:
                await future
                continue
            yield event
            if isinstance(event, Ended | Failed):
                return


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
