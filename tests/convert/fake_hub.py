"""A hub on this machine: the requests that huggingface_hub sends for a model, answered from folders."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from pathlib import Path
from typing import Any

COMMIT = "a" * 40


class FakeHub:
    """Models by id; `requests` has what was asked. `broken` breaks the connection of a file once, after half of it."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.card: dict[str, Any] = {"license": "other", "license_name": "baichuan2-community"}
        self.gated: set[str] = set()
        self.tampered: set[str] = set()
        self.broken: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, False)

            def do_GET(self) -> None:
                hub.answer(self, True)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler, has_body: bool) -> None:
        path = handler.path.partition("?")[0].strip("/")
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[:2])
        if name in self.gated:
            return self.refuse(handler, 403, "GatedRepo", "Access to model is restricted")
        if name not in self.models:
            return self.refuse(handler, 401, "RepoNotFound", "Repository not found")
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", "v2", COMMIT):
            return self.refuse(handler, 404, "RevisionNotFound", "Invalid rev id")
        if path.startswith("api/"):
            return self.send(handler, 200, json.dumps(self.describe(name)).encode(), {}, has_body)
        file = self.models[name] / "/".join(parts[4:])
        if not file.is_file():
            return self.refuse(handler, 404, "EntryNotFound", "Entry not found")
        return self.send_file(handler, file, has_body)

    def describe(self, name: str) -> dict[str, Any]:
        files = []
        for path in sorted(p for p in self.models[name].iterdir() if p.is_file()):
            content = path.read_bytes()
            entry: dict[str, Any] = {"rfilename": path.name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            files.append(entry)
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "cardData": self.card, "tags": []}

    def send_file(self, handler: http.server.BaseHTTPRequestHandler, file: Path, has_body: bool) -> None:
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest() if is_large(file) else hashlib.sha1(content).hexdigest()
        if file.name in self.tampered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if has_body and self.broken.get(file.name):
            self.broken[file.name] -= 1
            self.send(handler, 206 if first else 200, content[first:], headers, True, half=True)
        else:
            self.send(handler, 206 if first else 200, content[first:], headers, has_body)

    def refuse(self, handler: http.server.BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
        self.send(handler, status, b"{}", {"X-Error-Code": code, "X-Error-Message": message}, True)

    def send(
        self, handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str],
        has_body: bool, half: bool = False,
    ) -> None:  # fmt: skip
        handler.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            handler.send_header(name, value)
        handler.end_headers()
        if has_body and handler.command != "HEAD":
            handler.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            handler.close_connection = True

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def is_large(path: Path) -> bool:
    """Whether the hub keeps it by its SHA-256."""
    return path.suffix in (".safetensors", ".bin", ".model")
