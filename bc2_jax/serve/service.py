"""The engine as a service: one decoding thread that takes requests from any thread."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from bc2_jax.serve.followers import Leader
from bc2_jax.serve.requests import Ended, Failed, Handle, NotReady, QueueFull, Request
from bc2_jax.serve.scheduler import Scheduler
from bc2_jax.serve.stats import Observe, Stats
from bc2_jax.serve.turns import Kind, Runner, empty_turn
from bc2_jax.serve.waiting import QueueLimits, Waiting
from bc2_jax.validation import require

State = Literal["loading", "ready", "draining", "stopped", "dead"]
_IDLE_S = 1.0
"""Longest sleep without requests; then the thread updates its heartbeat and, with several processes, sends a turn."""
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Service:
    """Accepts requests, assigns rows and delivers new tokens. All methods are thread-safe.

    `unread` is the number of events that may wait for a reader before its request is cancelled. A dispatch longer than
    `stall_s` seconds makes the service stalled. `observe` is called in the engine thread and must not block. `on_death`
    is called there if an exception ends the thread.
    """

    def __init__(
        self, runner: Runner | Leader, limits: QueueLimits | None = None, *, unread: int = 512, stall_s: float = 60.0,
        observe: Observe | None = None, on_death: Callable[[BaseException], None] | None = None,
    ):  # fmt: skip
        self.limits, self.shapes = limits or QueueLimits(), runner.shapes
        self.seconds: dict[str, float] = {}
        """Warm-up seconds of each program."""
        self.error: BaseException | None = None
        """The exception that made the service dead."""
        self._runner, self._unread, self._stall_s, self._on_death = runner, unread, stall_s, on_death
        self._stats = Stats()
        self._scheduler = Scheduler(runner, self._stats, observe)
        self._changed = threading.Condition()
        self._waiting = Waiting(self.limits)
        self._cancelled: list[Handle] = []
        self._between: deque[Handle] = deque()
        """Requests that the current turn has taken from the queue and that neither have a row nor have ended."""
        self._state: State = "loading"
        self._is_stopping = False
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    # -------------------------------------------------------------------------------------------------- life and health

    def start(self, wait: bool = True) -> None:
        """Starts the thread, which compiles everything and then is ready; `wait` waits for that.

        Raises RuntimeError if it died meanwhile.
        """
        self._thread.start()
        if wait:
            with self._changed:
                self._changed.wait_for(lambda: self._state != "loading")
            if self.error is not None:
                raise RuntimeError(f"The engine could not start: {self.error}") from self.error

    @property
    def state(self) -> State:
        return self._state

    @property
    def heartbeat_s(self) -> float:
        """Seconds since the thread began its newest turn; at most about one second without work."""
        return time.monotonic() - self._heartbeat

    @property
    def is_stalled(self) -> bool:
        """Whether a dispatch takes too long although the thread has not failed."""
        return self._state in ("ready", "draining") and self.heartbeat_s > self._stall_s

    @property
    def is_healthy(self) -> bool:
        """Whether requests are accepted and decoded."""
        return self._state == "ready" and not self.is_stalled

    def drain(self, timeout: float | None = None) -> bool:
        """Accepts no more requests, completes running ones, then stops; returns whether it did within `timeout`
        seconds.
        """
        with self._changed:
            if self._state in ("loading", "ready"):
                self._state = "draining"
            self._changed.notify_all()
        return self._join(timeout)

    def stop(self, timeout: float | None = 60.0) -> bool:
        """Ends all requests and the thread; returns whether it ended within `timeout` seconds."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        return self._join(timeout)

    def _join(self, timeout: float | None) -> bool:
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def stats(self) -> Stats:
        """A copy of the counters and current gauges."""
        with self._changed:
            waiting = len(self._waiting) + len(self._between)  # a request is always counted somewhere
            return dataclasses.replace(self._stats, requests=self._stats.requests.copy(), waiting=waiting)

    # --------------------------------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> Handle:
        """Accepts a request; raises as `submit_all`."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """Accepts all of these requests, of one owner, or none.

        Raises NotReady unless the service is ready, QueueFull, and ValueError for a request that does not fit a row.
        """
        for request in requests:
            legal = "it must be at least 1 id"
            require(len(request.ids) > 0, "ids", request.ids, legal)
            legal = f"prompt and max_new_tokens must fit the {self.shapes.slots} tokens of a row"
            require(request.reserved <= self.shapes.slots, "prompt and max_new_tokens", request.reserved, legal)
        handles = [Handle(request, self._unread, self._cancel) for request in requests]
        with self._changed:
            if self._state != "ready" or self._is_stopping:
                raise NotReady("draining" if self._state == "ready" else self._state)
            problem = self._waiting.why_full(handles, self._scheduler.free_rows)
            if problem is not None:
                self._stats.rejected += len(handles)
                wait_s = self._scheduler.row_s * len(self._waiting) / self.shapes.rows
                raise QueueFull(problem, min(60, max(1, math.ceil(wait_s))))
            for handle in handles:
                self._waiting.put(handle)
            self._changed.notify_all()
        return handles

    def queue_place(self, handle: Handle) -> int | None:
        """Number of requests that will get a row before this one; None once it has one."""
        with self._changed:
            return self._waiting.place_of(handle)

    def _cancel(self, handle: Handle) -> None:
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------ the engine thread

    def _live(self) -> None:
        try:
            self.seconds = self._runner.warm_up()
            jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
            self._heartbeat = time.monotonic()
            self._become("ready")
            while self._turn():
                pass
            self._end_all("draining", Failed("The server stops.", 503))
            # Not after a failure, which ends this process and with it the others.
            self._runner.run(empty_turn(self.shapes, Kind.STOP))
            self._become("stopped")
        except BaseException as error:  # whatever it is, no reader may keep waiting for this thread
            self.error = error
            self._end_all("dead", Failed("The engine has failed.", 500))
        with contextlib.suppress(ValueError, AssertionError):  # it was not registered yet
            jax.monitoring.unregister_event_duration_listener(self._count_compilation)
        if self.error is not None and self._on_death is not None:
            self._on_death(self.error)

    def _become(self, state: State) -> None:
        with self._changed:
            if self._state != "draining" or state != "ready":
                self._state = state
            self._changed.notify_all()

    def _end_all(self, state: State, event: Failed) -> None:
        """Ends all requests; from `state` on none is accepted."""
        self._become(state)
        for handle in self._scheduler.served:
            self._scheduler.end(handle, event)
        for handle in list(self._waiting):
            self._waiting.remove(handle)
            self._end_waiting(handle, event)
        while self._between:
            self._between.popleft().put(event)  # ignored if its last event was put

    def _end_waiting(self, handle: Handle, event: Ended | Failed) -> None:
        self._stats.count(event)
        handle.put(event)

    def _turn(self) -> bool:
        """One turn; returns False if it was the last."""
        self._heartbeat = time.monotonic()
        scheduler = self._scheduler
        with self._changed:
            if scheduler.is_idle and not self._is_to_do():
                self._changed.wait(_IDLE_S)
            if self._is_stopping:
                return False
            now = self._heartbeat = time.monotonic()
            cancelled, self._cancelled = self._cancelled, []
            removed: list[tuple[Handle, Ended | Failed]]
            removed = [(handle, Ended("cancelled")) for handle in cancelled if self._waiting.remove(handle)]
            slow = Failed("No row was free in time.", 503)
            removed += [(handle, slow) for handle in self._waiting.remove_expired(now)]
            self._between += [handle for handle, _ in removed]
        for handle in cancelled:
            scheduler.end(handle, Ended("cancelled"))
        for handle in scheduler.served:
            if now - handle.submitted > self.limits.total_s:
                scheduler.end(handle, Failed("The request took too long.", 504))
        with self._changed:
            admitted = [self._waiting.take() for _ in range(min(scheduler.free_rows, len(self._waiting)))]
            self._between += admitted
            is_last = self._state == "draining" and not self._waiting and not admitted and scheduler.is_idle
        for _, event in removed:
            self._end_waiting(self._between.popleft(), event)
        for handle in admitted:
            scheduler.admit(handle)
            self._between.popleft()
        if not is_last:
            scheduler.turn()
        return not is_last

    def _is_to_do(self) -> bool:
        return bool(self._waiting or self._cancelled or self._is_stopping or self._state == "draining")

    def _count_compilation(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == self._thread.ident:
            self._stats.compilations += 1
