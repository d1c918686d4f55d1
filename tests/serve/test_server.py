"""The process: addresses and keys, draining at a signal, the exit code, connections that send nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import pytest

from bc2_jax.serve import server as server_module
from bc2_jax.serve.api import Api, Backend
from bc2_jax.serve.errors import ApiError
from bc2_jax.serve.security import Hosts, Keys, check_address, is_loopback, read_keys
from bc2_jax.serve.server import Connection, listen, run_server
from tests.programs import load_program
from tests.serve.fake_service import FakeService

KEY = "sk-0123456789abcdef"
ASK = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def test_only_loopback_needs_no_key():
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        check_address(host, has_keys=False)
    for host in ("0.0.0.0", "::", "192.168.0.5", "example.org", "", "localhost.example"):
        assert not is_loopback(host)
        check_address(host, has_keys=True)
        with pytest.raises(ValueError, match="--host = .* is not valid: without an API key it must be a loopback"):
            check_address(host, has_keys=False)


def test_files_of_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{KEY}\n  ann   {KEY}-2\n")
    keys = Keys(read_keys(path))
    assert keys.find_owner(f"Bearer {KEY}") == "key-1" and keys.find_owner(f"bearer  {KEY}-2 ") == "ann"
    for given in (None, "", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}-3", "Bearer \u00ff\udcff"):
        with pytest.raises(ApiError) as error:
            keys.find_owner(given)
        assert error.value.status == 401
    for text, message in (
        ("", "has no API key"), ("short", "line 1 is not valid"), (f"a {KEY} b", "line 1 is not valid"),
        (f"\n{KEY}\u00e9", "line 2 is not valid"),
    ):  # fmt: skip
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as wrong:
            read_keys(path)
        assert KEY not in str(wrong.value) and "short" not in str(wrong.value)
    assert not Keys([])


def test_an_address_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(OSError, match=f"--port {port} is not available: Address already in use"):
            listen("127.0.0.1", port)


class Process:
    """`run_server` in this thread, which has the signals, and what others do meanwhile."""

    def __init__(self, model, service: FakeService | None, **options):
        self.service, self.backend = service, Backend(service)
        self.api = Api(model, self.backend, keys=Keys([]), hosts=Hosts("127.0.0.1"))
        self.listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.options = options
        self.errors: list[BaseException] = []

    def run(self, meanwhile: Callable[[httpx.Client], None]) -> int:
        """The exit code."""

        def do() -> None:
            try:
                with httpx.Client(base_url=self.url, timeout=60) as client:
                    while True:
                        with contextlib.suppress(httpx.TransportError):
                            client.get("/health")
                            break
                    meanwhile(client)
            except BaseException as error:  # reported by the test
                self.errors.append(error)
                self.backend.has_failed = True

        thread = threading.Thread(target=do, daemon=True)
        thread.start()
        with self.listening:
            code = run_server(self.api.app, self.backend, self.listening, **self.options)
        thread.join(60)
        if self.errors:
            raise self.errors[0]
        assert not thread.is_alive()
        return code


@pytest.fixture
def answers(served_model):
    ids = served_model.tokenizer.encode("abcdefgh")
    return lambda **options: FakeService(lambda request: ids, **options)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_drains(served_model, answers):
    """What runs is completed, what comes is refused, health says so; then the process ends with 0."""
    gate, answer = threading.Event(), answers().answer
    process = Process(served_model, FakeService(lambda request: gate.wait(60) and answer(request)))

    def meanwhile(client: httpx.Client) -> None:
        with client.stream("POST", "/v1/chat/completions", json=ASK) as response:
            lines = response.iter_lines()
            next(lines)
            terminate()
            with httpx.Client(base_url=process.url, timeout=60) as other:
                while other.get("/health").status_code == 200:
                    time.sleep(0.02)
                assert other.get("/health").json() == {"status": "draining"}
                refused = other.post("/v1/chat/completions", json=ASK)
                assert refused.status_code == 503 and refused.headers["retry-after"] == "30"
            gate.set()
            assert list(lines)[-2:] == ["data: [DONE]", ""]

    assert process.run(meanwhile) == 0
    assert process.service.ended == ["eos"]


def test_draining_takes_only_so_long(served_model, answers):
    process = Process(served_model, answers(token_s=100), drain_s=0.3)

    def meanwhile(client: httpx.Client) -> None:
        threading.Timer(0.3, terminate).start()
        with contextlib.suppress(httpx.TransportError):
            client.post("/v1/chat/completions", json=ASK)

    start = time.monotonic()
    assert process.run(meanwhile) == 0 and time.monotonic() - start < 25  # the default is 30


def test_a_dead_engine_ends_the_process_with_an_error(served_model, answers):
    process = Process(served_model, answers())

    def meanwhile(client: httpx.Client) -> None:
        assert client.get("/health").status_code == 200
        process.service.state = "dead"

    assert process.run(meanwhile) == 1


def test_a_signal_while_the_model_is_loaded(served_model):
    def meanwhile(client: httpx.Client) -> None:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        terminate()

    assert Process(served_model, None).run(meanwhile) == 0


def test_a_model_that_cannot_be_loaded(served_model):
    process = Process(served_model, None)

    def meanwhile(client: httpx.Client) -> None:
        process.backend.has_failed = True

    assert process.run(meanwhile) == 1


def test_connections_that_send_nothing_are_closed(served_model, answers, monkeypatch):
    class Quick(Connection):
        header_s = 0.4

    monkeypatch.setattr(server_module, "Connection", Quick)
    process = Process(served_model, answers(token_s=0.15))
    port = process.listening.getsockname()[1]
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"

    def meanwhile(client: httpx.Client) -> None:
        for before, first in ((b"", b""), (b"", whole[:30]), (whole, whole[:5])):
            start = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
                if before:
                    slow.sendall(before)
                    assert b"200 OK" in slow.recv(9999)
                slow.sendall(first)
                with contextlib.suppress(ConnectionResetError):
                    assert slow.recv(9999) == b""
                assert 0.2 < time.monotonic() - start < 12  # the default is 15
        # An answer takes as long as it takes.
        assert client.post("/v1/chat/completions", json=ASK).text.endswith("data: [DONE]\n\n")
        terminate()

    assert process.run(meanwhile) == 0


# --------------------------------------------------------------------------------------------------- the program's side


@pytest.fixture
def program(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BC2_API_KEY", raising=False)
    return load_program("serve")


def test_without_a_model_it_says_how_to_make_one(program, capsys):
    assert program.main([]) == 1
    error = capsys.readouterr().err
    assert "there is no runs/demo_chat to serve" in error and "train.py" in error and "demo_chat.py" in error


def test_arguments_that_are_not_legal(program, capsys, tmp_path, small_tokenizer):
    model, golden = tmp_path / "model", Path(__file__).parents[1] / "golden" / "evals"
    model.mkdir()
    shutil.copy(golden / "model" / "config.json", model)
    shutil.copy(small_tokenizer.path, model / "tokenizer.model")
    keys = tmp_path / "keys"
    keys.write_text(KEY[:5])
    for arguments, message in (
        (["--host", "0.0.0.0"], "--host = '0.0.0.0' is not valid: without an API key"),
        (["--api-key-file", str(tmp_path / "none")], "No such file"),
        (["--api-key-file", str(keys)], "the key in line 1 is not valid"),
        (["--slots", "0"], "--slots = 0 is not valid: it must be at least 1"),
        (["--queue", "0"], "requests = 0 is not valid"),
        (["--tensor", "2", "--mesh.tensor", "4"], "--tensor = 2 is not valid: --mesh.tensor is 4"),
        (["--slot-length", "257"], "--slot-length = 257 is not valid: it must be in 2..256"),
    ):
        assert program.main([str(model), *arguments]) == 1
        assert message in capsys.readouterr().err
    (model / "config.json").write_text((model / "config.json").read_text().replace("2304", "400"))
    assert program.main([str(model)]) == 1
    assert "= 490 is not valid: the model has 400 ids" in capsys.readouterr().err
    assert program.main([str(tmp_path / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_key_of_the_environment(program, monkeypatch, tmp_path):
    monkeypatch.setenv("BC2_API_KEY", KEY)
    path = tmp_path / "keys"
    path.write_text(f"ann {KEY}2")
    assert program.read_all_keys(path) == [("ann", f"{KEY}2"), ("env", KEY)]
    monkeypatch.setenv("BC2_API_KEY", "short")
    with pytest.raises(ValueError, match="the key in BC2_API_KEY is not valid") as error:
        program.read_all_keys(None)
    assert "short" not in str(error.value)
