"""A real server on loopback, with the API in front of a fake service."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
import uvicorn

from bc2_jax.config import ModelConfig
from bc2_jax.serve.api import Api, Backend
from bc2_jax.serve.bodies import Limits
from bc2_jax.serve.prompts import ServedModel, chat_defaults
from bc2_jax.serve.security import Hosts, Keys
from bc2_jax.serve.server import Connection
from bc2_jax.tokenizer import Tokenizer
from tests.serve.fake_service import FakeService

LENGTH = 256


class Running(NamedTuple):
    """A server, and what is behind it."""

    url: str
    port: int
    service: FakeService
    model: ServedModel
    api: Api
    client: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """A JSON request."""
        return self.client.post(path, json=body, **options)


@pytest.fixture(scope="session")
def served_model(tokenizer: Tokenizer) -> ServedModel:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, model_max_length=LENGTH, position_embedding="rope",
    )  # fmt: skip
    settings, most = chat_defaults({"temperature": 0.4, "max_new_tokens": 99}, config, LENGTH)
    return ServedModel(
        "tiny", tokenizer, config, LENGTH, (tokenizer.eos_id,), settings, most, "bc2-0123", 1_700_000_000
    )


@contextlib.contextmanager
def running(
    model: ServedModel, service: FakeService | None, *, keys: Any = (), limits: Limits | None = None,
    hosts: Hosts | None = None, send_buffer: int | None = None, **options: Any,
) -> Iterator[Running]:  # fmt: skip
    backend = Backend(service)
    api = Api(model, backend, keys=Keys(keys), hosts=hosts or Hosts("127.0.0.1"), limits=limits, **options)
    if service is not None:
        api.metrics.watch(service.stats)
    config = uvicorn.Config(
        api.app, lifespan="off", log_config=None, access_log=False, http=Connection, server_header=False, ws="none",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        if send_buffer is not None:  # of the connections too
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Running(url, port, service, model, api, client)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve(served_model: ServedModel) -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """(text of the answer, fields of FakeService, options of `running`) -> a server."""

    def start(text: str = "hello world", fake: dict[str, Any] | None = None, **options: Any):
        ids = served_model.tokenizer.encode(text)
        return running(served_model, FakeService(lambda request: ids, **(fake or {})), **options)

    return start
