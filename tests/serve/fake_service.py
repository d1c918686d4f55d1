"""A service without an engine: requests are answered with the ids of a script, as fast or as badly as a test says."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from bc2_jax.infer.settings import Settings
from bc2_jax.serve.requests import (
    Ended,
    Failed,
    Handle,
    NotReady,
    PromptScored,
    QueueFull,
    Request,
    Started,
    Tokens,
    TokenScore,
)
from bc2_jax.serve.stats import Stats

Script = Callable[[Request], Sequence[int]]


@dataclasses.dataclass
class FakeService:
    """`answer` gives the ids with which a request is answered, before max_new_tokens and eos are looked at."""

    answer: Script
    state: str = "ready"
    is_healthy: bool = True
    token_s: float = 0.0
    """Seconds that each token takes."""
    queue_s: float = 0.0
    """Seconds in the queue, as one of `place` others."""
    place: int = 3
    tokens_a_time: int = 1
    full: int = 0
    """So many submissions find the queue full."""
    fail_after: int | None = None
    """Tokens after which a request fails with status `fail_status`."""
    fail_status: int = 500
    unread: int = 512

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self.ended: list[str] = []
        self.running = 0
        self._started: set[int] = set()
        self._lock = threading.Lock()

    def stats(self) -> Stats:
        return Stats(running=self.running, rows=4, generated_tokens=7)

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        if self.state != "ready":
            raise NotReady(self.state)
        if self.full > 0:
            self.full -= 1
            raise QueueFull("9 requests are waiting; at most 9 may.", 1)
        handles = []
        for request in requests:
            assert len(request.ids) > 0 and isinstance(request.settings, Settings)
            stop = threading.Event()
            handle = Handle(request, self.unread, lambda handle, stop=stop: self._cancel(handle, stop))
            handles.append(handle)
            self.requests.append(request)
            with self._lock:
                self.running += 1
            threading.Thread(target=self._run, args=(handle, stop), daemon=True).start()
        return handles

    def queue_place(self, handle: Handle) -> int | None:
        return None if id(handle) in self._started or not self.queue_s else self.place

    def drain(self, timeout: float | None = None) -> bool:
        if self.state == "ready":
            self.state = "draining"
            threading.Thread(target=self._stop_when_idle, daemon=True).start()
        return self.state == "stopped"

    def _stop_when_idle(self) -> None:
        if self.wait_idle(60):
            self.state = "stopped"

    def stop(self, timeout: float | None = None) -> bool:
        self.state = "stopped"
        return True

    def _cancel(self, handle: Handle, stop: threading.Event) -> None:
        self.cancelled.append(handle.request)
        stop.set()

    def _run(self, handle: Handle, stop: threading.Event) -> None:
        event = self._events(handle, stop)
        with self._lock:
            self.ended.append(event.reason if isinstance(event, Ended) else "failed")
            self.running -= 1
        handle.put(event)

    def _events(self, handle: Handle, stop: threading.Event) -> Ended | Failed:
        request, settings = handle.request, handle.request.settings
        if stop.wait(self.queue_s):
            return Ended("cancelled")
        self._started.add(id(handle))
        handle.put(Started(len(request.ids) // 2, settings.seed))
        if request.prompt_log_probs is not None:
            first, *rest = (self.score(i, request.prompt_log_probs) for i in request.ids)
            handle.put(PromptScored([None, *rest]))
        ids = list(self.answer(request))[: settings.max_new_tokens]
        reason = "length"
        for i, token in enumerate(ids):
            if token in settings.eos_token_id:
                ids, reason = ids[: i + 1], "eos"
                break
        if reason == "length" and len(ids) < settings.max_new_tokens and settings.eos_token_id:
            ids, reason = [*ids, settings.eos_token_id[0]], "eos"
        for start in range(0, len(ids), self.tokens_a_time):
            if self.fail_after is not None and start >= self.fail_after:
                return Failed("The engine has failed.", self.fail_status)
            if stop.wait(self.token_s):
                return Ended("cancelled")
            new = ids[start : start + self.tokens_a_time]
            top = request.top_log_probs
            if not handle.put(Tokens(new if top is None else [self.score(i, top) for i in new])):
                return Ended("cancelled")
        return Ended(reason)

    @staticmethod
    def score(token: int, top: int) -> TokenScore:
        """The most likely are the token itself and those after it."""
        found = tuple((token + k, -0.1 * (token % 7) - k) for k in range(top))
        return TokenScore(token, -0.1 * (token % 7), found)

    def wait_idle(self, seconds: float = 20.0) -> bool:
        """Whether nothing is running any more; less than the 30 s after which limits of the server would act."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.running == 0
