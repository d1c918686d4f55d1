"""Reading the body of a request, within limits of size and time, and noticing a client that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.limits import Limits

T = TypeVar("T")


class Disconnected(Exception):
    """The client is gone: nobody reads a reply."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request that says it is JSON; raises ApiError before more than `limits.body_bytes` are held."""
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
    """Returns when the client has closed the connection; to be called once its body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def race_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled if the client goes away: then raises Disconnected.

    Nothing else would stop it: a server cancels what it streams, but not what it computes for a whole body.
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
