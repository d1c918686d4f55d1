"""Middleware around all routes: host names, keys, errors as JSON, headers, and one log line per request."""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bc2_jax.serve.bodies import Disconnected
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.metrics import Metrics
from bc2_jax.serve.security import HEADERS, Hosts, Keys

_OPEN = ("/", "/health", "/favicon.ico", "/page/{name}")
"""Routes without a key: they reveal only whether the server is up and the page's files."""
logger = logging.getLogger("bc2_jax.serve")
_LONGEST_TEXT = 2000
_CODES = {404: "not_found", 405: "method_not_allowed"}


@dataclasses.dataclass
class Record:
    """What is known about one HTTP request, filled in on its way."""

    request_id: str
    method: str
    route: str
    """The route's pattern, not the requested path, which could be anything."""
    owner: str = ""
    user: str = ""
    status: int = 0
    outcome: str = ""
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    cached_tokens: int | None = None
    started: float = dataclasses.field(default_factory=time.monotonic)

    def line(self) -> str:
        """Known values as `name=value`; values from the client are quoted so that they cannot forge a line."""
        values = {
            "id": self.request_id, "key": self.owner or None, "user": ascii(self.user) if self.user else None,
            "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens, "new_tokens": self.new_tokens,
            "outcome": self.outcome or None, "seconds": f"{time.monotonic() - self.started:.3f}",
        }  # fmt: skip
        found = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        return f"{self.method} {self.route} {self.status} {found}"


def log_request(record: Record) -> None:
    """Logs one line per request: ids, sizes and times. Skips health checks, which are frequent."""
    if record.route == "/health" or (record.route == "/metrics" and record.status == 200):
        return
    logger.info("%s", record.line())


def log_texts(request_id: str, name: str, texts: Sequence[object]) -> None:
    """Logs prompts or answers, shortened, for --log-prompts."""
    for text in texts:
        logger.info("%s %s %s", request_id, name, ascii(text)[:_LONGEST_TEXT])


def log_failure(request_id: str, error: BaseException, with_message: bool) -> None:
    """Logs where an exception came from; its message may contain a prompt and is logged only on request."""
    places = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    message = f": {error}" if with_message else ""
    logger.error("%s failed with %s%s\n%s", request_id, type(error).__name__, message, places)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, dict(headers or {}), "application/json")


class Guard:
    """The ASGI application around the router."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[str], keys: Keys, hosts: Hosts, metrics: Metrics, *,
        log_prompts: bool = False,
    ):  # fmt: skip
        """`routes` are the route paths; a path whose last part is in braces matches any last part."""
        self._app, self._keys, self._hosts, self._metrics = app, keys, hosts, metrics
        self._routes = {route for route in routes if "{" not in route}
        self._folders = {route.partition("{")[0]: route for route in routes if "{" in route}
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(
                f"{scope['type']} is not supported: start the server with lifespan off and no websockets"
            )
        record = Record(f"req-{uuid.uuid4().hex}", scope["method"], self._route(scope["path"]))
        scope.setdefault("state", {})["record"] = record
        scope["app"] = self  # otherwise Starlette answers unknown paths itself, in plain text
        is_started = False

        async def send_all(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started, record.status = True, message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self._run(scope, receive, send_all, record)
        except Disconnected:
            record.outcome = record.outcome or "disconnected"
        except Exception as error:  # a server bug: the client gets an id to report, and no traceback
            log_failure(record.request_id, error, self._log_prompts)
            record.outcome = "failed"
            if not is_started:
                message = f"the server has failed; the id of this request is {record.request_id}."
                await _reply(ApiError(500, message, code="internal_error"), scope, receive, send_all)
        finally:
            log_request(record)
            self._metrics.count_http(record.route, record.status)

    async def _run(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            headers = Headers(scope=scope)
            self._hosts.check(headers.getlist("host"))
            if self._keys and record.route not in _OPEN:
                record.owner = self._keys.find_owner(headers.get("authorization"))
            await self._app(scope, receive, send)
        except ApiError as error:
            await _reply(error, scope, receive, send)
        except HTTPException as error:
            code = _CODES.get(error.status_code)
            reply = ApiError(error.status_code, _explain(scope, error), code=code)
            await _reply(reply, scope, receive, send, error.headers)

    def _route(self, path: str) -> str:
        return path if path in self._routes else self._folders.get(path[: path.rfind("/") + 1], "other")


def _explain(scope: Scope, error: HTTPException) -> str:
    if error.status_code == 405:
        return f"this path does not take {scope['method'][:20]}."
    return "this path does not exist; GET /openapi.json lists the endpoints."


async def _reply(
    error: ApiError, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
) -> None:
    response = json_response(error.body, error.status, {**(headers or {}), **error.headers})
    await response(scope, receive, send)
