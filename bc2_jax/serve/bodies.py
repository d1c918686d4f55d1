"""Request limits, reading of request bodies within them, and detection of disconnected clients."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from bc2_jax.serve.errors import ApiError
from bc2_jax.validation import require_positive

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on each request, checked before anything is allocated for it."""

    body_bytes: int = 1 << 20
    messages: int = 500
    prompts: int = 64  # prompts of one request to /v1/completions
    n: int = 8  # choices per prompt
    choices: int = 128  # prompts times n
    stop: int = 16
    stop_characters: int = 128
    logit_bias: int = 300
    top_logprobs: int = 20  # of a chat
    logprobs: int = 5  # of a completion
    body_seconds: float = 30.0  # seconds for a client to send its body
    unread_seconds: float = 30.0
    """Seconds for a client to read; then its request is cancelled and the connection closed."""
    ping_seconds: float = 15.0  # seconds of silence after which a stream sends a comment, to keep connections open

    def __post_init__(self) -> None:
        require_positive(self, "", *(field.name for field in dataclasses.fields(self)))


class Disconnected(Exception):
    """The client has disconnected."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request; raises ApiError before more than `limits.body_bytes` are in memory."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Content-Type must be application/json.", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding is not supported: send the body as it is.", code="unsupported_media_type")
    too_large = ApiError(413, f"the body is too large: at most {limits.body_bytes} bytes.", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        late = f"the body did not arrive within {limits.body_seconds:g} seconds."
        raise ApiError(408, late, code="timeout") from None


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client closes the connection; call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def race_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`; cancels it and raises Disconnected if the client disconnects.

    Nothing else would stop it: the server cancels only streams.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(until_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise Disconnected
        return worker.result()
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
