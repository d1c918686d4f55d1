"""The server process: connections, signals, draining, and an exit code that tells whether the engine died."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from bc2_jax.serve.api import Backend

_MOST_CONNECTIONS = 512
_GRACE_S = 5
"""Seconds for complete replies to reach their clients."""


class Connection(H11Protocol):
    """A connection with a time limit of `header_s` seconds for the headers of each request.

    The application can abort it with `scope["state"]["abort"]`.
    """

    header_s = 15.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._deadline: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    @property
    def _is_waiting(self) -> bool:
        """Whether a request or the rest of its headers is still to come."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._is_waiting:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.header_s, self._expire)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self._is_waiting:
            self.transport.abort()


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or Ctrl-C: no new requests, and running ones are completed within `drain_s` seconds.
    A second signal, or a dead engine, ends it at once.
    """

    def __init__(self, config: uvicorn.Config, backend: Backend, drain_s: float):
        super().__init__(config)
        self._backend, self._drain_s = backend, drain_s
        self._drained_since: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._backend.is_draining:
            self.force_exit = self.should_exit = True
        self._backend.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to exit."""
        return await super().on_tick(counter) or self._is_over()

    def _is_over(self) -> bool:
        service = self._backend.service
        if self._backend.state == "dead":
            return True
        if not self._backend.is_draining:
            return False
        if service is None:
            return True
        now = time.monotonic()
        if self._drained_since is None:
            self._drained_since = now
            service.drain(0)
        elif now - self._drained_since > self._drain_s:
            service.stop(0)
        return service.state == "stopped"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError that names the address if it is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=_MOST_CONNECTIONS)
    except OSError as error:
        raise OSError(f"--host {host} --port {port} is not available: {error.strerror or error}.") from error


def run_server(app: ASGIApp, backend: Backend, listening: socket.socket, *, drain_s: float = 30.0) -> int:
    """Serves until a signal or the end of the engine. Returns the exit code: 0, or 1 if the engine failed."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, http=Connection, ws="none", server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=_GRACE_S, limit_concurrency=_MOST_CONNECTIONS,
    )  # fmt: skip
    Server(config, backend, drain_s).run([listening])
    return 1 if backend.state == "dead" else 0
