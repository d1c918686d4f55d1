"""Server-sent events of a reply, comments while it waits, and detection of clients that stop reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bc2_jax.serve.answering import Answering, Begun, Done, New, Queued
from bc2_jax.serve.bodies import Disconnected, Limits, until_disconnect
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.replies import Json, Writer
from bc2_jax.serve.schema import Options

DONE = b"data: [DONE]\n\n"
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def encode_event(value: Json) -> bytes:
    """One `data:` line followed by an empty line; JSON contains no line break."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def events(
    answering: Answering, writer: Writer, options: Options, usage: Callable[[], Json], ping_s: float
) -> AsyncIterator[bytes]:
    """Events of a reply up to `[DONE]` or an error.

    While the request is queued, a comment gives the number of requests ahead whenever it changes; another comment says
    that its prompt is being read; and one follows `ping_s` seconds without any output.
    """
    state, sent = "", time.monotonic()
    try:
        async for update in answering.updates():
            chunks: list[Json] = []
            match update:
                case Queued():
                    found = (
                        state if update.is_started else "prefill" if update.place is None else f"queued {update.place}"
                    )
                    if found != state or time.monotonic() - sent >= ping_s:
                        comment, state = found if found != state else "ping", found
                        sent = time.monotonic()
                        yield f": {comment}\n\n".encode()
                    continue
                case Begun():
                    chunks = writer.start(update.choice, update.prompt_scores)
                case New():
                    chunks = writer.piece(update.choice, update.piece)
                case Done():
                    chunks = writer.last(update.choice, update.piece, update.reason)
            if chunks:
                if options.has_continuous_usage:
                    for chunk in chunks:
                        chunk["usage"] = usage()
                sent = time.monotonic()
                yield b"".join(map(encode_event, chunks))
        yield (encode_event(writer.usage(usage())) if options.has_usage else b"") + DONE
    except ApiError as error:
        yield encode_event(error.body)
        raise


class EventStream(Response):
    """Sends events until the client disconnects or reads nothing for `limits.unread_seconds`.

    `on_end` is called at the end with the outcome: ok, error, disconnected or unread.
    """

    def __init__(
        self, content: AsyncIterator[bytes], limits: Limits, headers: dict[str, str], on_end: Callable[[str], None]
    ):
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS | headers)
        self._content, self._limits, self._on_end = content, limits, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "disconnected"
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(until_disconnect(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                outcome = sender.result()
        finally:
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)
            self._on_end(outcome)
        if outcome == "unread":
            abort = scope.get("state", {}).get("abort")
            if abort is not None:  # otherwise the server waits until written data is read
                abort()
            raise Disconnected

    async def _send(self, send: Send) -> str:
        try:
            async with asyncio.timeout(self._limits.unread_seconds):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            outcome = "ok"
            try:
                async for body in self._content:
                    async with asyncio.timeout(self._limits.unread_seconds):
                        await send({"type": "http.response.body", "body": body, "more_body": True})
            except ApiError:
                outcome = "error"
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return "unread"
        return outcome
