"""A server for the chat page that answers what a test tells it to, in the protocol of `bc2_jax/serve`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FOLDER = Path(__file__).parents[2] / "bc2_jax" / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DEFAULTS = {
    "max_tokens": 2048, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Comment:
    text: str


@dataclass(frozen=True)
class Failure:
    """A refusal instead of an answer."""

    status: int
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


# What is streamed: text is a delta, a number seconds of silence, a dict an event as it is, an Event is waited for.
Step = str | float | dict[str, Any] | Comment | threading.Event


class MockServer:
    """Runs in a thread of this process; a test sets the fields and reads `requests`.

    Fields: `steps` of the next answers (None: the last user message, in pieces), `failures` given first, one a request,
    `cut` bytes a network write (None: whole events), `dropped` rounds, `key` asked for, `ends` whether [DONE] is sent,
    `finish` the finish_reason, `model` the name it gives itself.
    """

    def __init__(self) -> None:
        self.reset()
        self.port = 0
        self.server: uvicorn.Server | None = None
        self.thread: threading.Thread | None = None

    def reset(self) -> None:
        self.steps: Sequence[Step] | None = None
        self.failures: list[Failure] = []
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0
        self.cut: int | None = None
        self.dropped = 0
        self.key: str | None = None
        self.ends = True
        self.finish = "stop"
        self.model = "Baichuan2-13B-Chat"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Listens; a second start uses the port of the first."""
        routes = [
            Route("/", self.index), Route("/page/{name}", self.file), Route("/favicon.ico", self.favicon),
            Route("/health", self.health), Route("/settings", self.settings),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]  # fmt: skip
        config = uvicorn.Config(Starlette(routes=routes), port=self.port, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def kill(self) -> None:
        """Breaks every connection and stops listening, as a process that dies."""
        assert self.server is not None and self.thread is not None
        loop = self.server.servers[0].get_loop()
        for connection in list(self.server.server_state.connections):
            loop.call_soon_threadsafe(connection.transport.abort)  # type: ignore[union-attr]  # of h11 and httptools
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()

    async def index(self, request: Request) -> Response:
        return self.page_file("index.html")

    async def file(self, request: Request) -> Response:
        return self.page_file(request.path_params["name"])

    def page_file(self, name: str) -> Response:
        types = {".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html", ".css": "text/css"}
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return FileResponse(FOLDER / name, media_type=types[Path(name).suffix], headers=headers)

    async def favicon(self, request: Request) -> Response:
        return self.page_file("favicon.svg")

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ready"})

    async def settings(self, request: Request) -> Response:
        if (refusal := self.refusal(request)) is not None:
            return refusal
        limits = {"n": 8, "stop": 16, "messages": 500, "body_bytes": 1 << 20}
        return JSONResponse(
            {"model": self.model, "max_model_len": 4096, "slots": 8, "system_fingerprint": "bc2-0",
             "chat": DEFAULTS, "completions": DEFAULTS, "limits": limits}
        )  # fmt: skip

    def refusal(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error_response(Failure(401, "The API key is missing or wrong."))
        return None

    async def chat(self, request: Request) -> Response:
        if (refusal := self.refusal(request)) is not None:
            return refusal
        body = json.loads(await request.body())
        self.requests.append(body)
        if self.failures:
            return error_response(self.failures.pop(0))
        headers = {
            "X-Request-Id": "r",
            "X-Seed": "7",
            "X-Dropped-Rounds": str(self.dropped),
            "Cache-Control": "no-cache",
        }
        return StreamingResponse(self.stream(body), media_type="text/event-stream", headers=headers)

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        try:
            async for piece in self.events(body):
                for start in range(0, len(piece), size := self.cut or len(piece)):
                    yield piece[start : start + size]
                    if self.cut:
                        await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        question = body["messages"][-1]["content"]
        steps = self.steps if self.steps is not None else [question[i : i + 3] for i in range(0, len(question), 3)]
        yield event(delta={"role": "assistant", "content": ""})
        count = 0
        for step in steps:
            if isinstance(step, str):
                count += 1
                yield event(delta={"content": step})
            elif isinstance(step, Comment):
                yield f": {step.text}\n\n".encode()
            elif isinstance(step, dict):
                yield f"data: {json.dumps(step)}\n\n".encode()
            elif isinstance(step, threading.Event):
                while not step.is_set():
                    await asyncio.sleep(0.01)
            else:
                await asyncio.sleep(step)
        if not self.ends:
            return
        yield event(delta={}, finish=self.finish)
        usage = {
            "prompt_tokens": 9,
            "completion_tokens": count,
            "total_tokens": 9 + count,
            "dropped_rounds": self.dropped,
        }
        usage["prompt_tokens_details"] = {"cached_tokens": 4}  # type: ignore[assignment]  # the one nested field
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"


def event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "seed": 7, "choices": [choice]}
    return f"data: {json.dumps(chunk | {'usage': None}, ensure_ascii=False)}\n\n".encode()


def error_response(failure: Failure) -> Response:
    error = {"message": failure.message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, failure.status, dict(failure.headers))


if __name__ == "__main__":  # to look at the page by hand
    mock = MockServer()
    mock.port = 8123
    mock.start()
    print(mock.url)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
