"""What the chat page says while it waits and when something is wrong, and how it recovers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser.mock_server import Comment, Failure, MockServer
from tests.browser.tab import Tab


def test_waiting_reading_and_writing_are_told_apart(tab: Tab, server: MockServer) -> None:
    gates = [threading.Event() for _ in range(4)]
    server.steps = [
        Comment("queued 3"), gates[0], Comment("queued 0"), gates[1], Comment("ping"), Comment("prefill"), gates[2],
        "text", gates[3],
    ]  # fmt: skip
    tab.send("hi", wait=False)
    shown = ["Waiting: 3 ahead", "Waiting: next in line", "Reading the conversation…", "Writing…"]
    for gate, text in zip(gates, shown, strict=True):
        tab.wait_text(".state", text)
        tab.wait_true(f"document.querySelector('#announcer').textContent === {json.dumps(text)}")
        gate.set()
    tab.wait_idle()
    assert tab.texts(".state:visible") == []
    assert tab.page.text_content("#announcer") == "text "  # read out once, when it is complete


def test_a_limit_and_an_empty_answer_are_named(tab: Tab, server: MockServer) -> None:
    server.steps, server.finish = ["long"], "length"
    tab.send("hi")
    assert tab.texts(".state:visible") == ["Ended at the limit of tokens"]
    server.steps, server.finish = [], "stop"
    tab.send("hi")
    assert tab.texts(".state:visible")[-1] == "The model answered nothing"


def test_rounds_that_the_model_did_not_see_are_counted(tab: Tab, server: MockServer) -> None:
    for server.dropped in (1, 3):
        tab.send("hi")
    text = "The model did not see the first {} of this conversation: it has no room for them."
    assert tab.texts(".notice:visible") == [text.format("round"), text.format("3 rounds")]


def test_a_refusal_is_shown_in_the_servers_words_and_retried(tab: Tab, server: MockServer) -> None:
    message = "The system text, the newest round (9000 tokens) and max_tokens = 2048 do not fit into 4096 tokens."
    server.failures = [Failure(400, message)]
    tab.send("hi")
    assert tab.texts(".state.error")[0].startswith(message)
    server.steps = ["fine"]
    tab.page.click(".retry")
    tab.wait_text(".assistant .body", "fine")
    tab.wait_idle()
    assert server.requests[0]["messages"] == server.requests[1]["messages"]


def test_a_question_without_an_answer_is_not_sent_again(tab: Tab, server: MockServer) -> None:
    server.failures = [Failure(400, "No.")]
    tab.send("first")
    tab.send("second")
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["second"]


def test_a_busy_server_is_asked_again_when_it_said(tab: Tab, server: MockServer) -> None:
    server.failures = [
        Failure(429, "The queue is full.", {"Retry-After": "1"}),
        Failure(503, "Loading.", {"Retry-After": "1"}),
    ]
    server.steps = ["served"]
    tab.send("hi", wait=False)
    tab.wait_text(".state", "The server is busy. Trying again in 1 s…")
    tab.wait_text(".assistant .body", "served")
    assert len(server.requests) == 3


def test_stop_ends_the_wait_for_a_busy_server(tab: Tab, server: MockServer) -> None:
    server.failures = [Failure(429, "The queue is full.", {"Retry-After": "60"})]
    tab.send("hi", wait=False)
    tab.wait_text(".state", "Trying again in")
    tab.page.click("#stop")
    tab.wait_idle()
    assert tab.texts(".state:visible") == ["Stopped"]


def test_an_error_in_the_stream_and_a_stream_that_breaks_off_keep_what_came(tab: Tab, server: MockServer) -> None:
    server.steps, server.ends = ["half ", {"error": {"message": "The engine failed.", "code": None}}], False
    tab.send("hi")
    assert tab.texts(".state.error")[0].startswith("The engine failed.")
    server.steps = ["half "]
    tab.send("again")
    assert tab.texts(".state.error")[-1].startswith("The connection broke before the answer was complete.")
    server.steps, server.ends = ["whole"], True
    tab.page.locator(".retry", has_text="Continue").last.click()
    tab.wait_text(".assistant .body", "half whole")


@pytest.fixture
def mortal_server() -> Iterator[MockServer]:
    server = MockServer()
    server.start()
    yield server
    server.kill()


def test_a_server_that_dies_and_comes_back(open_tab: Callable[..., Tab], mortal_server: MockServer) -> None:
    tab = open_tab(url=mortal_server.url)
    mortal_server.steps = ["half an ", threading.Event()]
    tab.send("hi", wait=False)
    tab.wait_text(".assistant .body", "half an")
    mortal_server.kill()
    tab.wait_idle()
    tab.wait_text("#banner", "The server cannot be reached. Trying again…")
    assert tab.answers() == ["half an"]
    tab.send("lost")
    assert tab.texts(".state.error")[1].startswith("The server cannot be reached.")
    mortal_server.start()
    mortal_server.steps = ["answer"]
    tab.wait_text("#banner", "The server is back.")
    tab.page.locator(".retry").last.click()
    tab.wait_text(".assistant .body", "answer")
    tab.wait_idle()
    assert [message["content"] for message in mortal_server.requests[-1]["messages"]] == ["hi", "half an ", "lost"]
    tab.page.wait_for_selector("#banner", state="hidden")


def test_a_server_that_is_started_after_the_page_was_loaded(tab: Tab, server: MockServer) -> None:
    tab.page.route("**/settings", lambda route: route.fulfill(status=503, json={"error": {"message": "Loading."}}))
    tab.page.reload()
    tab.wait_text("#banner", "The server is loading the model…")
    tab.page.unroute("**/settings")
    tab.wait_text("#banner", "The server is back.")
    tab.wait_text("#model", "Baichuan2-13B-Chat")


def test_a_server_that_refuses_the_page_is_not_asked_again_and_again(tab: Tab, server: MockServer) -> None:
    refusals = []

    def refuse(route: Any) -> None:
        refusals.append(route)
        route.fulfill(status=403, json={"error": {"message": "This server is not called evil.example."}})

    tab.page.route("**/settings", refuse)
    tab.page.reload()
    tab.wait_text("#banner", "This server is not called evil.example.")
    tab.page.wait_for_timeout(300)
    assert len(refusals) == 1


def test_an_api_key_is_asked_for_kept_and_sent(tab: Tab, server: MockServer) -> None:
    server.key = "secret"
    tab.page.reload()
    tab.wait_text("#key-text", "This server asks for an API key.")
    tab.page.fill("#key", "wrong")
    tab.page.press("#key", "Enter")
    tab.wait_text("#key-text", "The server does not accept this key.")
    tab.page.fill("#key", "secret")
    tab.page.click("#use-key")
    tab.wait_text("#model", "Baichuan2")
    tab.send("hi")
    assert tab.answers() == ["hi"]
    tab.page.reload()
    tab.wait_text("#model", "Baichuan2")
    assert tab.page.evaluate("localStorage.getItem('bc2.key')") is None  # it was not asked to remember it
    server.key = "other"
    tab.page.fill("#input", "again")
    tab.page.press("#input", "Enter")
    tab.wait_text("#key-text", "The server does not accept this key.")
    tab.page.check("#keep-key")
    tab.page.fill("#key", "other")
    tab.page.press("#key", "Enter")
    tab.wait_text(".assistant .body", "again")
    assert tab.page.evaluate("localStorage.getItem('bc2.key')") == '"other"'


def test_without_a_key_the_page_says_so(tab: Tab, server: MockServer) -> None:
    server.key = "secret"
    tab.page.reload()
    tab.wait_text("#key-text", "This server")
    tab.page.keyboard.press("Escape")
    tab.wait_text("#banner", "The server needs a valid API key.")
    tab.page.fill("#input", "hi")
    tab.page.press("#input", "Enter")
    tab.wait_text("#key-text", "This server")
    tab.page.keyboard.press("Escape")
    tab.wait_text(".state.error", "The server needs a valid API key.")


def test_full_storage_is_said_and_loses_nothing_before_the_page_is_closed(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.send("small")
    room = "localStorage.setItem('other', 'x'.repeat(5 * 1024 * 1024 - 1500 - JSON.stringify(localStorage).length))"
    tab.page.evaluate(room)
    tab.page.click("#new")
    tab.send("large " * 300)
    tab.wait_text("#full", "The browser's storage is full")
    tab.page.locator("#chats .title", has_text="small").click()
    tab.page.locator("#chats .title", has_text="large").click()
    assert len(tab.answers()[0]) > 1700
    tab.page.evaluate("localStorage.removeItem('other')")
    tab.send("more")
    tab.page.wait_for_selector("#full", state="hidden")
    tab.page.reload()
    tab.page.wait_for_selector(".message")
    assert tab.answers()[1] == "more"


def test_blocked_and_foreign_storage_do_not_stop_the_page(open_tab: Callable[..., Tab]) -> None:
    blocked = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    tab = open_tab(before=blocked)
    tab.send("hi")
    assert tab.answers() == ["hi"]
    assert tab.page.is_visible("#full")
    fields: dict[str, Any] = {"title": "t", "system": "", "changed": 1}
    orphan = {"b": {"id": "b", "parent": "c", "role": "user", "content": ""}}
    values = [
        "{",
        "null",
        "[]",
        '{"id": "a"}',
        json.dumps(fields),
        json.dumps(fields | {"id": "5", "messages": orphan}),
    ]
    lines = [f"localStorage.setItem('bc2.chat.{place}', {value!r});" for place, value in enumerate(values)]
    tab = open_tab(before="".join(lines) + "localStorage.setItem('bc2.sampler', '[]');")
    tab.page.goto(tab.url + "#3")
    tab.wait_true("location.hash === ''")  # the page found no conversation "3" and opened a new one
    tab.send("hi")
    assert tab.answers() == ["hi"] and tab.texts("#chats .title") == ["hi"]
    for place, value in enumerate(values):  # they may be another program's
        assert tab.page.evaluate(f"localStorage.getItem('bc2.chat.{place}')") == value
