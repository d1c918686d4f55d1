"""A tiny server with OpenAI's API for chats, whose replies a test writes byte by byte."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Write = Callable[[bytes], None]
Reply = Callable[["Handler", dict[str, Any]], None]


def event(text: str | None = None, reason: str | None = None) -> bytes:
    """One chunk of a chat."""
    delta = {} if text is None else {"content": text}
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


class Handler(BaseHTTPRequestHandler):
    """One request; `reply` of the server answers a chat."""

    protocol_version = "HTTP/1.1"
    server: FakeChatServer

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        self.refuse(404) if self.server.model is None else self.send_json(200, {"data": [{"id": self.server.model}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.reply(self, body)

    def send_json(self, status: int, value: Any, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str = "no.", **headers: str) -> None:
        """An error as the API has it."""
        self.send_json(status, {"error": {"message": message}}, **headers)

    def stream(self, **headers: str) -> Write:
        """Begins a stream; what it returns sends bytes, as one chunk of HTTP."""
        self.send_response(200)
        fields = {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked", **headers}
        for name, text in fields.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

        def write(content: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
            self.wfile.flush()

        return write

    def say(self, *texts: str, reason: str = "stop", **headers: str) -> None:
        """A whole answer."""
        write = self.stream(**headers)
        write(b": queued 1\n\n" + event(""))
        for text in texts:
            write(event(text))
        write(event(None, reason) + b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None: ...


class FakeChatServer(ThreadingHTTPServer):
    """What was asked of it, and what it replies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.model: str | None = "tiny"
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply: Reply = lambda handler, body: handler.say("yes")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what some tests are about."""


@contextlib.contextmanager
def serving() -> Iterator[FakeChatServer]:
    server = FakeChatServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)
