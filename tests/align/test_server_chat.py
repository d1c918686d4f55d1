"""Asking a server over HTTP, and the events that it streams."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.align import server_chat
from bc2_jax.align.dialogue import Dialogue
from bc2_jax.align.server_chat import MOST_EVENT_BYTES, ChatServer, EventReader, ServerError
from tests.align.fake_chat_server import FakeChatServer, event, serving

ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def running() -> Iterator[FakeChatServer]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running) -> FakeChatServer:
    running.asked.clear()
    running.keys.clear()
    running.model = "tiny"
    return running


def test_an_answer_is_streamed_as_it_comes(server):
    """The second part is sent only when the first was given."""
    has_first = threading.Event()

    def reply(handler, body):
        write = handler.stream(X_Dropped_Rounds="2")
        write(b": prefill\n\n" + event("") + event("白日"))
        assert has_first.wait(60)
        write(event("依山尽") + event(None, "length") + b"data: [DONE]\n\n")

    def on_text(text: str) -> None:
        said.append(text)
        has_first.set()

    server.reply, said = reply, []
    chat = ChatServer(server.url + "/v1/", "a key of 16 characters")
    chat.find_model()
    settings = {"max_new_tokens": 9, "temperature": 0.5, "stop": ["end"], "seed": None}
    found = chat.answer(QUESTION, on_text, settings)
    assert (found.text, found.reason, found.dropped_rounds) == ("白日依山尽", "length", 2)
    assert said == ["白日", "依山尽"]
    assert server.asked == [
        {
            "model": "tiny", "messages": QUESTION, "stream": True, "max_tokens": 9, "temperature": 0.5, "stop": ["end"],
        }
    ]  # fmt: skip
    assert server.keys == ["Bearer a key of 16 characters"] * 2


def test_nothing_is_said_that_was_not_given(server):
    """Settings, key, and the model's name from a server that has no /v1/models."""
    server.reply, server.model = lambda handler, body: handler.say("y", "es"), None
    chat = ChatServer(server.url)
    chat.find_model()
    assert chat.model is None
    assert chat.answer(QUESTION, lambda text: None, {"stop": []}).text == "yes"
    assert server.asked == [{"messages": QUESTION, "stream": True}] and server.keys == [None, None]


STREAM = (
    b"\r\n: a comment\n"
    b"data: one\n\nevent: x\r\ndata:two\r\ndata: lines \xe7\x99\xbd\r\n\r\nid: 3\rdata: three\r\rdata\n\n"
    b"data: not ended"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_however_they_are_cut(cuts):
    reader, at, found = EventReader(), 0, []
    for cut in [*sorted(cuts), len(STREAM)]:
        found += reader.add(STREAM[at:cut])
        at = cut
    assert found == ["one", "two\nlines 白", "three", ""]


def test_events_that_are_no_text_or_endless_are_refused():
    with pytest.raises(ValueError, match="utf-8"):
        EventReader().add(b"data: \xff\n\n")
    reader = EventReader()
    with pytest.raises(ValueError, match="more than"):
        for _ in range(MOST_EVENT_BYTES // 2**20 + 1):
            reader.add(b"data: " + b"x" * 2**20 + b"\n")


def test_a_busy_server_is_asked_again_when_it_says(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    busy = iter(["7", "soon", "9999"])

    def reply(handler, body):
        after = next(busy, None)
        handler.say("yes") if after is None else handler.refuse(429, "the queue is full.", Retry_After=after)

    server.reply, remarks = reply, []
    assert ChatServer(server.url, say=remarks.append).answer(QUESTION, lambda text: None, {}).text == "yes"
    assert waits == [7, 1, 60] and remarks[0] == "the server is busy; trying again in 7 s"
    server.reply = lambda handler, body: handler.refuse(429, "the queue is full.")
    with pytest.raises(ServerError, match=r"refuses \(429\): the queue is full\.$"):
        ChatServer(server.url).answer(QUESTION, lambda text: None, {})
    assert len(waits) == 3 + server_chat.TRIES - 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda h, body: h.refuse(401, "an API key is needed."), "wants an API key .*: an API key is needed.$"),
        (lambda h, body: h.refuse(503, "the server is loading; try again later."), r"refuses \(503\): the ser"),
        (lambda h, body: h.send_json(500, []), r"refuses \(500\): Internal Server Error.$"),
        (lambda h, body: h.send_json(200, {}), "does not stream its answers: it sends application/json.$"),
        (lambda h, body: h.stream()(event("wh") + b"data: {}}\n\n"), "sends a chunk that is not of a chat.$"),
        (lambda h, body: h.stream()(b"data: []\n\n"), "sends a chunk that is not of a chat.$"),
        (lambda h, body: h.stream()(b"data: \xff\n\n"), "sends unreadable events"),
        (lambda h, body: h.stream()(b'data: {"error": {"message": "the engine has failed."}}\n\n'), "engine has"),
    ],
    ids=["401", "503", "500", "no stream", "no JSON", "no chunk", "no UTF-8", "error"],
)  # fmt: skip
def test_what_fails_is_one_sentence(server, reply, message):
    def answer(handler, body):
        reply(handler, body)
        handler.close_connection = True

    server.reply = answer
    with pytest.raises(ServerError, match=message) as found:
        ChatServer(server.url).answer(QUESTION, lambda text: None, {})
    assert "\n" not in str(found.value) and str(found.value).count(". ") == 0


def test_a_server_that_goes_away_leaves_the_conversation_as_it_was(server):
    talk = Dialogue(ChatServer(server.url).answer)
    said: list[str] = []
    for last in (b"", b'data: {"cho'):

        def reply(handler, body, last=last):
            handler.stream()(event("half an") + last)
            handler.close_connection = True

        server.reply = reply
        with pytest.raises(ServerError, match="broke off in the middle"):
            talk.ask("the cat", said.append)
        assert said.pop() == "half an" and talk.messages == []


def test_a_place_without_a_server(server):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        ServerError, match=f"the server at http://127.0.0.1:{port} can't be reached: Connection refused.$"
    ):
        ChatServer(f"http://127.0.0.1:{port}").find_model()
    for url in ("127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://user:key@host", "http://h/?a=b"):
        with pytest.raises(ValueError, match="--url = .* is not valid: it must be http://HOST:PORT"):
            ChatServer(url)


def test_stopping_closes_the_connection_and_keeps_what_was_said(server):
    gone = threading.Event()

    def reply(handler, body):
        write = handler.stream()
        try:
            while True:
                write(event("word "))
                time.sleep(0.01)
        except OSError:
            gone.set()
            handler.close_connection = True

    def on_text(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    server.reply, said = reply, []
    talk = Dialogue(ChatServer(server.url).answer)
    found = talk.ask("the cat", on_text)
    assert (found.text, found.reason) == ("word word word ", "interrupted")
    assert gone.wait(60), "the server still sends"
    assert talk.messages[-1] == {"role": "assistant", "content": found.text}


def test_asking_a_server_loads_no_jax():
    modules = ("dialogue", "server_chat", "terminal_chat")
    program = (
        "; ".join(f"import bc2_jax.align.{name}" for name in modules) + "; import sys; assert 'jax' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
