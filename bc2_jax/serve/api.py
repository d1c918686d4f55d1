"""HTTP routes: OpenAI's chats and completions, vLLM's tokenizer endpoints, health, metrics and the chat page."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.resources
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from bc2_jax.serve.answering import RETRY_AFTER_S, Answering, collect, not_ready
from bc2_jax.serve.bodies import Disconnected, Limits, race_disconnect, read_body
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.guard import Guard, Record, json_response, log_texts
from bc2_jax.serve.metrics import CONTENT_TYPE, Metrics
from bc2_jax.serve.openapi import make_document
from bc2_jax.serve.prompts import COMPLETION_SETTINGS, Asked, ServedModel, ask_chat, ask_completion
from bc2_jax.serve.replies import ChatWriter, CompletionWriter, Heading, usage_of
from bc2_jax.serve.schema import ChatBody, CompletionBody, decode_json, read_chat, read_completion, require_model
from bc2_jax.serve.security import PAGE_POLICY, Hosts, Keys
from bc2_jax.serve.service import Service
from bc2_jax.serve.streaming import EventStream, events
from bc2_jax.serve.tokens import detokenize, tokenize, tokenizer_info

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/x-icon",
    "txt": "text/plain; charset=utf-8",
}
INDEX = "index.html"
ICONS = ("favicon.svg", "favicon.ico")


class PageFile(NamedTuple):
    """A file of the chat page, held in memory: a request never becomes a path."""

    content: bytes
    kind: str
    tag: str


def read_page() -> Mapping[str, PageFile]:
    """Name -> file of `bc2_jax/serve/page`; empty if the package has no page."""
    folder = importlib.resources.files("bc2_jax.serve") / "page"
    found = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            content = file.read_bytes()
            found[file.name] = PageFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


class Backend:
    """Holds the service once it exists; the HTTP side answers while the model is still loading."""

    def __init__(self, service: Service | None = None):
        self.service = service
        self.is_draining = False
        self.has_failed = False
        """Whether the service could not be made."""

    @property
    def state(self) -> str:
        """loading, ready, stalled, draining, stopped or dead."""
        if self.has_failed:
            return "dead"
        if self.service is None:
            return "draining" if self.is_draining else "loading"
        state = self.service.state
        if state == "ready":
            return "draining" if self.is_draining else "ready" if self.service.is_healthy else "stalled"
        return state

    def get(self) -> Service:
        """The service; raises ApiError unless it is ready."""
        if self.service is None or self.state not in ("ready", "stalled"):
            raise not_ready(self.state)
        return self.service


class Api:
    """Handlers of the routes; `app` is the ASGI application."""

    def __init__(
        self, model: ServedModel, backend: Backend, *, keys: Keys, hosts: Hosts, limits: Limits | None = None,
        metrics: Metrics | None = None, log_prompts: bool = False,
    ):  # fmt: skip
        self._model, self._backend, self._log_prompts = model, backend, log_prompts
        self._limits, self.metrics = limits or Limits(), metrics or Metrics()
        # Tokenizing a long prompt must not block other streams.
        self._pool = ThreadPoolExecutor(2, "tokenizer")
        self._page = read_page()
        self._document = make_document(model, self._limits)
        routes = [
            Route("/", self.index),
            Route("/page/{name}", self.page),
            Route("/favicon.ico", self.icon),
            Route("/health", self.health),
            Route("/metrics", self.read_metrics),
            Route("/settings", self.settings),
            Route("/openapi.json", self.openapi),
            Route("/v1/models", self.models),
            Route("/v1/models/{model_id:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
        ]
        router = Router(routes, redirect_slashes=False)
        self.app: ASGIApp = Guard(
            router, [route.path for route in routes], keys, hosts, self.metrics, log_prompts=log_prompts
        )

    # -------------------------------------------------------------------------------------------- chats and completions

    async def chat(self, request: Request) -> Response:
        body = read_chat(await self._read(request), self._limits)
        return await self._reply(request, body, lambda owner: ask_chat(self._model, body, owner))

    async def complete(self, request: Request) -> Response:
        body = read_completion(await self._read(request), self._limits)
        return await self._reply(request, body, lambda owner: ask_completion(self._model, body, owner))

    async def _reply(self, request: Request, body: ChatBody | CompletionBody, ask: Callable[[str], Asked]) -> Response:
        require_model(body.model, self._model.name)
        service, record, options = self._backend.get(), _record(request), body.options
        asked = await self._in_pool(ask, record.owner)
        record.user, record.prompt_tokens = options.user, asked.prompt_tokens
        if self._log_prompts:
            texts = body.messages if isinstance(body, ChatBody) else body.prompts
            log_texts(record.request_id, "prompt", texts)
        answering = Answering(service, asked, options, self._model.tokenizer)
        kind, writer_class = ("chatcmpl", ChatWriter) if isinstance(body, ChatBody) else ("cmpl", CompletionWriter)
        heading = Heading(
            f"{kind}-{uuid.uuid4().hex}", int(time.time()), self._model.name, self._model.fingerprint, asked.seed
        )
        writer = writer_class(self._model, heading, asked, options)
        headers = {"X-Seed": str(asked.seed)}
        if asked.dropped_rounds is not None:
            headers["X-Dropped-Rounds"] = str(asked.dropped_rounds)

        def usage() -> dict[str, Any]:
            return usage_of(asked, answering.new_tokens, answering.cached_tokens)

        def end(outcome: str) -> None:
            answering.close()
            record.outcome, record.new_tokens = outcome, answering.new_tokens
            record.cached_tokens = answering.cached_tokens
            if self._log_prompts:
                log_texts(record.request_id, "answer", answering.texts)

        answering.start()
        if options.is_stream:
            content = events(answering, writer, options, usage, self._limits.ping_seconds)
            return EventStream(content, self._limits, headers, end)
        outcome = "error"
        try:
            choices = await race_disconnect(collect(answering), request.receive)
            outcome = "ok"
        except Disconnected:
            outcome = "disconnected"
            raise
        finally:
            end(outcome)
        return json_response(writer.whole(choices, usage()), headers=headers)

    async def _read(self, request: Request) -> dict[str, Any]:
        return decode_json(await read_body(request, self._limits))

    async def _in_pool(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    # ---------------------------------------------------------------------------------------------------- what there is

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._describe_model()]})

    async def one_model(self, request: Request) -> Response:
        require_model(request.path_params["model_id"], self._model.name)
        return json_response(self._describe_model())

    def _describe_model(self) -> dict[str, Any]:
        model = self._model
        return {
            "id": model.name, "object": "model", "created": model.created, "owned_by": "bc2_jax",
            "max_model_len": model.length,
        }  # fmt: skip

    async def settings(self, request: Request) -> Response:
        """GET /settings: settings shown by the page; an extension."""
        model, limits = self._model, dataclasses.asdict(self._limits)
        names = (
            "n", "stop", "stop_characters", "logit_bias", "top_logprobs", "logprobs", "messages", "prompts",
            "body_bytes",
        )  # fmt: skip
        service = self._backend.service
        return json_response({
            "model": model.name,
            "max_model_len": model.length,
            "slots": None if service is None else service.stats().rows,
            "system_fingerprint": model.fingerprint,
            "chat": {"max_tokens": model.chat_max_tokens, **model.chat_settings},
            "completions": {"max_tokens": 16, **COMPLETION_SETTINGS},
            "limits": {name: limits[name] for name in names},
        })  # fmt: skip

    async def tokenize(self, request: Request) -> Response:
        given = await self._read(request)
        return json_response(await self._in_pool(tokenize, self._model, given, self._limits))

    async def detokenize(self, request: Request) -> Response:
        given = await self._read(request)
        return json_response(await self._in_pool(detokenize, self._model, given))

    async def tokenizer_info(self, request: Request) -> Response:
        return json_response(tokenizer_info(self._model))

    async def openapi(self, request: Request) -> Response:
        return json_response(self._document)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while requests are accepted and answered, else 503."""
        state = self._backend.state
        if state == "ready":
            return json_response({"status": state})
        return json_response({"status": state}, 503, {"Retry-After": str(RETRY_AFTER_S.get(state, 30))})

    async def read_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    # --------------------------------------------------------------------------------------------------------- the page

    async def index(self, request: Request) -> Response:
        return self._file(request, INDEX)

    async def page(self, request: Request) -> Response:
        return self._file(request, request.path_params["name"])

    async def icon(self, request: Request) -> Response:
        name = next((name for name in ICONS if name in self._page), None)
        return Response(status_code=204) if name is None else self._file(request, name)

    def _file(self, request: Request, name: str) -> Response:
        file: PageFile | None = self._page.get(name)
        if file is None:
            raise ApiError(404, "the page has no such file.", code="not_found")
        headers: Mapping[str, str] = {
            "Content-Type": file.kind, "ETag": file.tag, "Cache-Control": "no-cache",
            "Content-Security-Policy": PAGE_POLICY,
        }  # fmt: skip
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=dict(headers))
        return Response(file.content, headers=dict(headers))


def _record(request: Request) -> Record:
    return request.scope["state"]["record"]
