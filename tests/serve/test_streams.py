"""Streams byte by byte: order of events, comments, characters that tokens split, slow readers, clients that leave."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import pytest

from bc2_jax.serve.bodies import Limits
from tests.serve.conftest import Running

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def events_of(server: Running, path: str = CHAT, **body) -> list[str]:
    """The events, without the empty line after each."""
    with server.client.stream("POST", path, json={**(ASK if path == CHAT else {"stream": True}), **body}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
        raw = b"".join(response.iter_raw()).decode()
    assert raw.endswith("\n\n")
    events = raw[:-2].split("\n\n")
    assert all(re.fullmatch(r": [^\n]+|data: [^\n]+", event) for event in events)
    return events


def chunks_of(events: list[str]) -> list[dict]:
    return [json.loads(event[6:]) for event in events if event.startswith("data: {")]


def texts_of(events: list[str]) -> list[str]:
    choices = [chunk["choices"][0] for chunk in chunks_of(events) if chunk["choices"]]
    return [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]


def test_the_order_of_events(serve):
    with serve("abc") as server:
        events = events_of(server, stream_options={"include_usage": True})
        assert events[-1] == "data: [DONE]" and events.count("data: [DONE]") == 1
        chunks = chunks_of(events)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["dropped_rounds"] == 0
        assert len({chunk["seed"] for chunk in chunks}) == 1


def test_comments_while_waiting(serve):
    with serve("abcdefgh", {"queue_s": 1.2, "token_s": 0.4, "place": 5}, limits=Limits(ping_seconds=0.3)) as server:
        events = events_of(server)
    comments = [event for event in events if event.startswith(":")]
    assert events[0] == ": queued 5" and comments.count(": queued 5") == 1
    assert comments[1:] and set(comments[1:]) <= {": ping", ": prefill"}
    assert "".join(texts_of(events)) == "abcdefgh"


def test_a_prefill_is_announced(serve):
    with serve("a") as server:
        handle_place = server.service.queue_place
        server.service.queue_s = 0.8
        server.service.queue_place = lambda handle: None
        assert events_of(server)[0] == ": prefill"
        server.service.queue_place = handle_place


@pytest.mark.parametrize("text", ["白日依山尽，黄河入海流。", "🀄 λ ½", "a\u2028b\x00c\r\n\ufffdd"])
def test_characters_are_whole(serve, text):
    """None of these has a piece, so that each byte is a token; JSON escapes what could end a line."""
    with serve(text) as server:
        for size in (1, 3):
            server.service.tokens_a_time = size
            found = texts_of(events_of(server))
            assert "".join(found) == text and all("\ufffd" not in part for part in found if "\ufffd" not in text)
        reply = server.post(CHAT, {**ASK, "stream": False, "logprobs": True}).json()["choices"][0]
        content = reply["logprobs"]["content"]
        assert reply["message"]["content"] == text == bytes(b for t in content for b in t["bytes"] or []).decode()
        first = text.encode()[0]
        if first > 127:
            assert content[0]["token"] == f"<0x{first:02X}>" and content[0]["bytes"] == [first]


def test_an_answer_cut_inside_a_character(serve):
    with serve("ab🀄") as server:
        count = len(server.model.tokenizer.encode("ab🀄")) - 1
        assert "".join(texts_of(events_of(server, max_tokens=count))) == "ab\ufffd\ufffd\ufffd"


def test_stop_texts(serve):
    text = "one two three four"
    with serve(text, {"token_s": 0.01}) as server:
        for stop, expected, reason in (
            (" thr", "one two", "stop"), (["ee f", "nothing"], "one two thr", "stop"), ("four!", text, "stop"),
            (["two", "one two"], "", "stop"), ("four", "one two three ", "stop"), ("x" * 128, text, "stop"),
            ([], text, "stop"), (None, text, "stop"),
        ):  # fmt: skip
            events = events_of(server, stop=stop)
            assert "".join(texts_of(events)) == expected, stop
            assert chunks_of(events)[-1]["choices"][0]["finish_reason"] == reason
            for start in range(1, len(expected)):  # nothing that may become a stop text was sent and taken back
                assert expected.startswith("".join(texts_of(events)[:start]))
        assert server.service.wait_idle() and server.service.cancelled


def test_a_stop_text_ends_the_request_at_its_token(serve):
    with serve("ab " * 60, {"token_s": 0.01, "tokens_a_time": 4}) as server:
        reply = server.post(CHAT, {**ASK, "stream": False, "stop": "b a", "logprobs": True}).json()
        tokens = [entry["token"] for entry in reply["choices"][0]["logprobs"]["content"]]
        assert reply["choices"][0]["message"]["content"] == "a" and "".join(tokens).startswith("ab a")
        assert reply["usage"]["completion_tokens"] == len(tokens) <= 4
        assert server.service.wait_idle() and server.service.ended == ["cancelled"]


def test_token_ids_are_those_of_the_engine(serve):
    with serve("hello 世界") as server:
        ids = server.model.tokenizer.encode("hello 世界")
        for path, body in ((CHAT, ASK), ("/v1/completions", {"prompt": "x", "stream": True})):
            chunks = chunks_of(events_of(server, path, **body, return_token_ids=True))
            found = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
            assert found == [*ids, 2][: len(found)] and len(found) >= len(ids)


def test_a_failure_after_the_headers(serve):
    with serve("abcdef", {"fail_after": 2, "fail_status": 503}) as server:
        events = events_of(server)
        assert json.loads(events[-1][6:])["error"]["message"] == "The engine has failed."
        assert "data: [DONE]" not in events
        assert server.service.ended == ["failed"]


def test_an_engine_that_dies_without_a_word(serve):
    with serve("abcdef", {"token_s": 100}) as server:

        def die() -> None:
            while not server.service.running:
                time.sleep(0.01)
            server.service.state = "dead"

        threading.Thread(target=die).start()
        events = events_of(server)
        assert json.loads(events[-1][6:])["error"]["code"] == "engine_failed"
        assert server.service.wait_idle()


def test_a_body_of_many_prompts_waits_for_room(serve):
    """More prompts than the queue has places are handed in one after the other."""
    with serve("abc") as server:
        submit, service = server.service.submit_all, server.service

        def submit_two(requests):
            service.full = int(service.running >= 2)
            return submit(requests)

        service.submit_all = submit_two
        service.token_s = 0.02
        reply = server.post("/v1/completions", {"prompt": [f"p{i}" for i in range(7)], "max_tokens": 3})
        assert [choice["text"] for choice in reply.json()["choices"]] == ["abc"] * 7


def test_a_client_that_leaves_frees_its_request(serve):
    """While it waits for the whole body, for a stream, and in the queue, where nothing is sent that could fail."""
    with serve("a" * 200, {"token_s": 0.02}) as server:
        for stream, queue_s in ((False, 0.0), (True, 0.0), (False, 30.0), (True, 30.0)):
            server.service.queue_s = queue_s
            body = json.dumps({**ASK, "stream": stream}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head.encode() + body)
                while not server.service.running:
                    time.sleep(0.01)
                time.sleep(0.1)
            assert server.service.wait_idle(), (stream, queue_s)
        assert server.service.ended == ["cancelled"] * 4


def test_a_client_that_does_not_read_is_cut_off(serve):
    """Its buffers are filled, nothing more is kept for it, and after a while its request is cancelled."""
    limits = Limits(unread_seconds=0.5)
    ids = list(range(200, 250)) * 5
    with serve(limits=limits, fake={"token_s": 0.002, "unread": 64}, send_buffer=8192) as server:
        server.service.answer = lambda request: ids
        body = json.dumps({**ASK, "max_tokens": 200, "n": 8, "logprobs": True, "top_logprobs": 20}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while not server.service.running:
                time.sleep(0.01)
            assert server.service.wait_idle()
            assert server.client.get("/health").status_code == 200
            assert "cancelled" in server.service.ended
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:  # the connection is aborted, not only left alone
                try:
                    connection.send(b"x")
                except OSError:
                    break
                time.sleep(0.05)
            else:
                pytest.fail("the connection is still open")
