"""Requests as bytes: every kind of error, headers, names, keys, the page's files, health, tokens."""

from __future__ import annotations

import json
import logging
import socket
import time

import httpx2 as httpx
import pytest

from bc2_jax.serve import api
from bc2_jax.serve.bodies import Limits
from bc2_jax.serve.security import Hosts
from tests.serve.conftest import LENGTH, Running

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}
KEY = "sk-0123456789abcdef"
POSTS = (CHAT, "/v1/completions", "/tokenize", "/detokenize")
GETS = ("/settings", "/v1/models", "/v1/models/tiny", "/tokenizer_info", "/metrics", "/openapi.json")


@pytest.fixture(scope="module")
def server(serve):
    with serve() as running:
        yield running


def error_of(response: httpx.Response, status: int, code: str | None) -> dict:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert response.headers["x-request-id"].startswith("req-")
    return error


def test_bodies_that_are_none(server):
    for path in POSTS:
        post = server.client.post
        error_of(post(path, content=b"{}", headers={"content-type": "text/plain"}), 415, "unsupported_media_type")
        gzip = {"content-type": "application/json", "content-encoding": "gzip"}
        error_of(post(path, content=b"{}", headers=gzip), 415, "unsupported_media_type")
        kind = {"content-type": "application/json; charset=utf-8"}
        for content in (
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"a": NaN}',
            b'{"a": 1e999}',
            b'{"a": "\\ud800"}',
            b"\xff",
            b"[" * 9999,
        ):
            error_of(post(path, content=content, headers=kind), 400, "invalid_json")
        error_of(post(path, content=b" " * (1 << 20) + b"{}", headers=kind), 413, "body_too_large")
        error_of(post(path, content=iter([b" " * 600_000] * 2), headers=kind), 413, "body_too_large")
        error_of(server.client.get(path), 405, "method_not_allowed")
    for path in ("/nothing", "/v1/embeddings", "/page/../api.py", "/page/%2e%2e%2fapi.py", "/page/none.js", "/page/"):
        error_of(server.client.get(path), 404, "not_found")


def test_the_context_is_too_short(server):
    ids = [300] * LENGTH
    error = error_of(server.post("/v1/completions", {"prompt": ids, "max_tokens": 7}), 400, "context_length_exceeded")
    assert f"{LENGTH} tokens and 7" in error["message"] and f"length of this server is {LENGTH}" in error["message"]
    fits = server.post("/v1/completions", {"prompt": ids[7:], "max_tokens": 7})
    assert fits.json()["usage"]["prompt_tokens"] == LENGTH - 7
    long = [{"role": "user", "content": "x y " * LENGTH}]
    error = error_of(server.post(CHAT, {"messages": long}), 400, "context_length_exceeded")
    assert error["param"] == "messages"


def test_rounds_without_room_are_dropped_and_counted(server):
    old = [{"role": "user", "content": "old " * 20}, {"role": "assistant", "content": "yes " * 20}] * 3
    response = server.post(CHAT, {"messages": [{"role": "system", "content": "be kind"}, *old, *ASK["messages"]]})
    dropped = response.json()["usage"]["dropped_rounds"]
    assert 0 < dropped <= 3 and response.headers["x-dropped-rounds"] == str(dropped)
    ids = server.service.requests[-1].ids
    assert ids.count(195) == 4 - dropped and len(ids) + 99 <= LENGTH
    assert server.model.tokenizer.decode(ids).startswith("be kind")


def test_while_there_is_no_engine(serve, served_model):
    with serve(fake={"state": "loading"}) as server:
        for state, retry_after in (("loading", "10"), ("draining", "30"), ("dead", "30"), ("stopped", "30")):
            server.service.state = state
            health = server.client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, state)
            assert health.headers["retry-after"] == retry_after
            response = server.post(CHAT, ASK)
            assert error_of(response, 503, "not_ready") and response.headers["retry-after"] == retry_after
        server.service.state = "ready"
        assert server.client.get("/health").status_code == 200
        server.service.is_healthy = False
        assert server.client.get("/health").json() == {"status": "stalled"}


def test_every_route_but_health_and_page_needs_a_key(serve):
    with serve(keys=[("a", KEY), ("b", KEY[::-1])]) as server:
        for method, paths in (("POST", POSTS), ("GET", GETS)):
            for path in paths:
                for given in (
                    {},
                    {"authorization": f"Bearer {KEY}x"},
                    {"authorization": KEY},
                    {"authorization": "Bearer"},
                ):
                    response = server.client.request(method, path, headers=given)
                    error_of(response, 401, "invalid_api_key")
                    assert response.headers["www-authenticate"] == "Bearer"
                for key in (KEY, KEY[::-1]):
                    response = server.client.request(method, path, headers={"authorization": f"bearer {key}"})
                    assert response.status_code in (200, 415), path
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/").status_code in (200, 404)
        error_of(server.client.get("/nothing"), 401, "invalid_api_key")


def test_names_of_the_server(serve):
    def ask(server: Running, *hosts: str) -> bytes:
        lines = ["GET /health HTTP/1.1", *(f"Host: {host}" for host in hosts), "Connection: close", "", ""]
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall("\r\n".join(lines).encode())
            return connection.makefile("rb").readline().split()[1]

    with serve(hosts=Hosts("127.0.0.1", ["proxy.example"])) as server:
        for host in ("127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:80", "[::1]", "proxy.example"):
            assert ask(server, host) == b"200", host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.", "", "proxy.example.evil:80"):
            assert ask(server, host) == b"403", host
    with serve(hosts=Hosts("0.0.0.0")) as server:
        assert ask(server, "anything.example:99") == b"200"


def test_headers_against_misuse(server):
    for response in (server.client.get("/settings"), server.post(CHAT, {}), server.client.get("/nothing")):
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert (
            response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-store"
        )
        assert not any(name.startswith("access-control") or name == "server" for name in response.headers)
    preflight = server.client.options(CHAT, headers={"origin": "https://evil.example"})
    assert preflight.status_code == 405


def test_files_of_the_page(serve, monkeypatch):
    files = {"index.html": api.PageFile(b"<p>", "text/html; charset=utf-8", '"tag"')}
    monkeypatch.setattr("bc2_jax.serve.api.read_page", lambda: files)
    with serve() as server:
        page = server.client.get("/")
        assert page.content == b"<p>" and page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "script-src 'self';" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert server.client.get("/", headers={"if-none-match": '"tag"'}).status_code == 304
        assert server.client.get("/page/index.html").content == b"<p>"
        assert server.client.head("/").status_code == 200
        assert server.client.get("/favicon.ico").status_code == 204
        error_of(server.client.get("/page/style.css"), 404, "not_found")


def test_tokens(server):
    tokenizer = server.model.tokenizer
    found = server.post("/tokenize", {"prompt": "def f(x): </s>", "add_special_tokens": False}).json()
    assert found["tokens"] == tokenizer.encode("def f(x): </s>") and found["count"] == len(found["tokens"])
    assert 2 not in found["tokens"]
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "def f(x): </s>"}
    parsed = server.post("/tokenize", {"prompt": "a</s>", "parse_special": True, "return_token_strs": True}).json()
    assert parsed["tokens"][-1] == 2 and parsed["token_strs"] == ["a", "</s>"]
    chat = server.post("/tokenize", {"messages": ASK["messages"]}).json()
    server.post(CHAT, ASK)
    assert tuple(chat["tokens"]) == server.service.requests[-1].ids and chat["dropped_rounds"] == 0
    info = server.client.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>" and info["bos_token"] is None
    for body in (
        {},
        {"prompt": "a", "messages": ASK["messages"]},
        {"messages": ASK["messages"], "parse_special": True},
    ):
        assert server.post("/tokenize", body).status_code == 400
    for tokens in ([-1], [10**9], [True], "a", None, [[1]]):
        assert server.post("/detokenize", {"tokens": tokens}).status_code == 400


def test_what_the_page_reads(server):
    found = server.client.get("/settings").json()
    assert found["model"] == "tiny" and found["max_model_len"] == LENGTH and found["slots"] == 4
    assert found["chat"] == {
        "max_tokens": 99, "temperature": 0.4, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
    }  # fmt: skip
    for path in (CHAT, "/v1/completions"):  # what it gives is what requests may say
        defaults = found["chat" if path == CHAT else "completions"]
        asked = ASK if path == CHAT else {"prompt": "hi"}
        assert server.post(path, {**asked, **defaults}).status_code == 200


def test_the_openapi_document_names_every_field(server):
    document = server.client.get("/openapi.json").json()
    for path, field in (("/v1/chat/completions", "messages"), ("/v1/completions", "prompt"), ("/tokenize", "prompt")):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert field in body["properties"] and body["additionalProperties"] is False
        assert all("description" in about for about in body["properties"].values())


def test_metrics(server):
    server.post("/v1/completions", {"prompt": ""})
    server.api.metrics.observe("first_token_s", 0.2)
    text = server.client.get("/metrics").text
    assert 'bc2_http_requests_total{route="/v1/completions",status="400"}' in text
    assert "bc2_time_to_first_token_seconds_count 1.0" in text and "bc2_generated_tokens_total 7.0" in text
    assert "bc2_compilations_after_start_total 0.0" in text and "bc2_requests_waiting 0.0" in text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert all(name.startswith("bc2_") for name in names)
    assert "/nothing" not in text  # a path that is not known is no label


def test_no_secret_is_logged(serve, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "Xyzzy the dragon"
    with serve(secret, keys=[("someone", KEY)]) as server:
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"messages": [{"role": "user", "content": secret}], "user": "evil\nid=forged"}
        assert server.post(CHAT, body, headers=headers).status_code == 200
        for path in (CHAT, "/v1/completions", f"/{KEY}"):
            server.post(path, {"prompt": secret, secret: secret}, headers=headers)
            server.post(path, {"prompt": secret}, headers={"authorization": f"Bearer {KEY}?"})
        server.service.answer = lambda request: 1 / 0 if secret else []
        server.service.submit_all = lambda requests: 1 / 0
        failed = server.post(CHAT, {"messages": [{"role": "user", "content": secret}]}, headers=headers)
        error = error_of(failed, 500, "internal_error")
        assert failed.headers["x-request-id"] in error["message"] and "Zero" not in failed.text
    ours = [record.getMessage() for record in caplog.records if record.name.split(".")[0] in ("bc2_jax", "uvicorn")]
    text = "\n".join(ours)
    assert "ZeroDivisionError" in text and "key=someone" in text and "prompt_tokens=" in text
    for word in (KEY, "Xyzzy", "dragon"):
        assert word not in text
    assert "\nid=forged" not in text and r"evil\nid=forged" in text


def test_prompts_are_logged_on_request(serve, caplog):
    caplog.set_level(logging.INFO)
    with serve("Xyzzy", log_prompts=True) as server:
        for stream in (False, True):
            server.post(CHAT, {"messages": [{"role": "user", "content": "a dragon"}], "stream": stream})
    assert caplog.text.count("a dragon") == 2 == caplog.text.count("Xyzzy")


def test_a_body_that_does_not_come(serve):
    with serve(limits=Limits(body_seconds=0.3)) as server:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            start = time.monotonic()
            connection.sendall(head.encode())
            reply = connection.makefile("rb").read1(9999)
            assert reply.split()[1] == b"408" and time.monotonic() - start < 20  # the default is 30
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
