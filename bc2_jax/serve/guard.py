"""What happens to every request before and after its route: names, keys, errors as JSON, headers, the log."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bc2_jax.serve.bodies import Disconnected
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.logs import Record, log_failure, log_request
from bc2_jax.serve.metrics import Metrics
from bc2_jax.serve.security import HEADERS, Hosts, Keys

_OPEN = ("/", "/health", "/favicon.ico", "/page/{name}")
"""Routes without a key: they tell nothing but whether the server is up, and what the page looks like."""
_CODES = {404: "not_found", 405: "method_not_allowed"}


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A reply that is JSON."""
    return Response(msgspec.json.encode(value), status, dict(headers or {}), "application/json")


class Guard:
    """An ASGI application around the routes' own."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[str], keys: Keys, hosts: Hosts, metrics: Metrics, *,
        log_prompts: bool = False,
    ):  # fmt: skip
        """`routes` are the paths; one whose last part is a name in braces stands for all with another last part."""
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
        scope["app"] = self  # without it, Starlette replies to unknown paths itself, in plain text
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
        except Exception as error:  # a fault of ours: the client gets an id to report, and no trace
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
    return "there is nothing at this path; GET /openapi.json describes what there is."


async def _reply(
    error: ApiError, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
) -> None:
    response = json_response(error.body, error.status, {**(headers or {}), **error.headers})
    await response(scope, receive, send)
