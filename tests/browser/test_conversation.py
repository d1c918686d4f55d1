"""Talking with a model on the chat page: sending, stopping, editing, regenerating, copying, keeping."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.browser.mock_server import MockServer
from tests.browser.tab import Tab


def test_a_conversation_of_two_rounds(tab: Tab, server: MockServer) -> None:
    server.steps = ["Hello", ", **you**", "!"]
    tab.send("Hi\nthere <b>")
    server.steps = ["再见"]
    tab.send("Bye")
    assert tab.questions() == ["Hi\nthere <b>", "Bye"]
    assert tab.answers() == ["Hello, you!", "再见"]
    assert tab.texts(".assistant strong") == ["you"]
    assert server.requests[1] == {
        "messages": [
            {"role": "user", "content": "Hi\nthere <b>"}, {"role": "assistant", "content": "Hello, **you**!"},
            {"role": "user", "content": "Bye"},
        ],
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert tab.page.title() == "Hi there <b> – bc2_jax"
    assert tab.texts(".figures")[0].startswith("3 tokens")


def test_text_appears_while_it_is_written_and_stop_frees_the_server(tab: Tab, server: MockServer) -> None:
    server.steps = ["one ", "two ", threading.Event()]
    tab.send("Count", wait=False)
    tab.wait_text(".assistant .body", "one two")
    assert tab.texts(".state:visible") == ["Writing…"]
    assert not tab.page.is_visible("#send")
    tab.page.fill("#input", "more")
    tab.page.press("#input", "Enter")  # nothing is sent while an answer is written, and the text stays
    assert tab.page.input_value("#input") == "more"
    tab.page.click("#stop")
    tab.wait_idle()
    assert tab.texts(".state:visible") == ["Stopped"]
    assert tab.answers() == ["one two"]
    assert len(server.requests) == 1
    tab.wait_equal(lambda: server.cancelled, 1)


def test_a_stopped_answer_is_continued(tab: Tab, server: MockServer) -> None:
    server.steps = ["one ", threading.Event()]
    tab.send("Count", wait=False)
    tab.wait_text(".assistant .body", "one")
    tab.page.keyboard.press("Escape")
    tab.wait_idle()
    server.steps = ["two"]
    tab.press(-1, "Continue")
    tab.wait_text(".assistant .body", "one two")
    tab.wait_idle()
    assert server.requests[1]["messages"][-1] == {"role": "assistant", "content": "one "}
    assert tab.message(-1).get_by_role("button", name="Continue", exact=True).count() == 0


def test_an_edited_message_starts_another_branch_and_the_first_one_stays(tab: Tab, server: MockServer) -> None:
    tab.send("first")
    tab.send("second")
    tab.press(0, "Edit")
    area = tab.page.locator(".editor textarea")
    assert area.input_value() == "first"
    area.press("Escape")
    assert tab.questions() == ["first", "second"]
    tab.press(0, "Edit")
    area.fill("other")
    area.press("Enter")
    tab.wait_idle()
    assert tab.questions() == ["other"] and tab.answers() == ["other"]
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["other"]
    tab.press(0, "Previous version")
    assert tab.questions() == ["first", "second"] and tab.answers() == ["first", "second"]
    assert tab.texts(".place") == ["1/2"]


def test_regenerating_keeps_the_earlier_answer(tab: Tab, server: MockServer) -> None:
    server.steps = ["A"]
    tab.send("Choose")
    server.steps = ["B"]
    tab.press(-1, "Regenerate")
    tab.wait_text(".assistant .body", "B")
    tab.wait_idle()
    assert tab.answers() == ["B"] and tab.texts(".place") == ["2/2"]
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    tab.press(-1, "Previous version")
    assert tab.answers() == ["A"]
    server.steps = None
    tab.send("next")
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["Choose", "A", "next"]


@pytest.mark.parametrize("secure", [True, False], ids=["clipboard", "plain http"])
def test_copying_a_message_and_its_code(open_tab: Callable[..., Tab], server: MockServer, secure: bool) -> None:
    before = "" if secure else "Object.defineProperty(navigator, 'clipboard', {get: () => undefined})"
    tab = open_tab(before=before)
    text = "See **this**:\n\n```python\nprint('<b>')\n\nprint(2)\n```\n"
    server.steps = [text]
    tab.send("code?")
    for button, expected in (("Copy", text), ("Copy code", "print('<b>')\n\nprint(2)")):
        tab.page.evaluate("document.querySelector('#announcer').textContent = ''")
        tab.press(-1, button)
        tab.wait_true("document.querySelector('#announcer').textContent === 'Copied'")
        tab.page.fill("#input", "")
        tab.page.press("#input", "Control+v")
        assert tab.page.input_value("#input") == expected


def test_conversations_are_listed_renamed_deleted_and_survive_a_reload(tab: Tab, server: MockServer) -> None:
    titles = "#chats .title"
    tab.send("About cats")
    tab.page.click("#new")
    tab.send("About dogs")
    assert tab.texts(titles) == ["About dogs", "About cats"]
    tab.page.reload()
    tab.page.wait_for_selector(".message")
    assert tab.questions() == ["About dogs"] and tab.answers() == ["About dogs"]
    tab.page.locator(titles, has_text="cats").click()
    assert tab.answers() == ["About cats"]
    tab.page.go_back()
    tab.wait_equal(tab.answers, ["About dogs"])
    tab.page.go_forward()
    tab.wait_equal(tab.answers, ["About cats"])
    tab.page.go_back()
    tab.wait_equal(tab.answers, ["About dogs"])
    item = tab.page.locator("#chats li", has_text="cats")
    item.hover()
    item.get_by_role("button", name="Rename").click()
    tab.page.fill("#chats input", "About 猫")
    tab.page.press("#chats input", "Enter")
    assert tab.texts(titles) == ["About dogs", "About 猫"]
    item = tab.page.locator("#chats li", has_text="dogs")
    item.hover()
    item.get_by_role("button", name="Delete").click()
    assert tab.texts(titles) == ["About 猫"] and tab.questions() == []
    tab.page.click("#toast button")
    assert tab.texts(titles) == ["About dogs", "About 猫"]
    item.hover()
    item.get_by_role("button", name="Delete").click()
    tab.page.reload()
    tab.page.wait_for_selector(titles)
    assert tab.texts(titles) == ["About 猫"]


def test_a_conversation_is_shown_at_once(tab: Tab, server: MockServer) -> None:
    """What is typed right after the click goes to the conversation that was clicked."""
    tab.send("cats")
    tab.page.click("#new")
    tab.send("dogs")
    tab.page.evaluate("""
        [...document.querySelectorAll('#chats .title')].find((title) => title.textContent === 'cats').click();
        const input = document.querySelector('#input');
        input.value = 'and lions';
        input.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 13}));
    """)
    tab.wait_idle()
    assert tab.questions() == ["cats", "and lions"]
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["cats", "cats", "and lions"]
    tab.page.reload()
    tab.wait_equal(tab.questions, ["cats", "and lions"])


def test_an_answer_is_written_on_while_another_conversation_is_shown(tab: Tab, server: MockServer) -> None:
    gate = threading.Event()
    server.steps = ["slow ", gate, "answer"]
    tab.send("slow?", wait=False)
    tab.wait_text(".assistant .body", "slow")
    tab.page.click("#new")
    server.steps = ["quick"]
    tab.send("quick?")
    assert tab.answers() == ["quick"]
    gate.set()
    tab.page.locator("#chats .title", has_text="slow").click()
    tab.wait_text(".assistant .body", "slow answer")
    tab.wait_idle()


def test_what_was_written_when_the_page_was_closed_is_kept(tab: Tab, server: MockServer) -> None:
    server.steps = ["half an ", threading.Event()]
    tab.send("go", wait=False)
    tab.wait_text(".assistant .body", "half an")
    tab.page.reload()
    tab.page.wait_for_selector(".message")
    assert tab.answers() == ["half an"]
    assert tab.texts(".state:visible") == ["Interrupted: the page was closed while this was written"]
    server.steps = ["answer"]
    tab.press(-1, "Continue")
    tab.wait_text(".assistant .body", "half an answer")


def test_a_conversation_that_is_deleted_while_it_is_written_stays_deleted(tab: Tab, server: MockServer) -> None:
    server.steps = ["one", threading.Event()]
    tab.send("hi", wait=False)
    tab.wait_text(".assistant .body", "one")
    tab.page.hover("#chats .title")
    tab.page.get_by_role("button", name="Delete").click()
    tab.wait_equal(lambda: server.cancelled, 1)
    tab.page.reload()
    tab.page.wait_for_selector("#chats .none")


def test_a_change_in_another_tab_is_shown_here(tab: Tab, server: MockServer) -> None:
    tab.send("one")
    second = tab.new_page()
    second.click("#chats .title")
    second.fill("#input", "two")
    second.press("#input", "Enter")
    tab.wait_true("document.querySelectorAll('.user').length === 2")
    tab.wait_text(".assistant .body", "two")


def test_settings_of_the_sampler_and_the_system_prompt_are_sent(tab: Tab, server: MockServer) -> None:
    tab.page.click("#settings-button")
    tab.page.wait_for_selector("#field-temperature[placeholder='0.3']")
    assert tab.page.get_attribute("#field-top_k", "placeholder") == "5"
    tab.page.fill("#field-temperature", "0.9")
    tab.page.fill("#field-top_k", "1.5")
    assert tab.page.get_attribute("#field-top_k", "aria-invalid") == "true"
    tab.page.fill("#field-seed", "4294967295")
    tab.page.press("#field-max_tokens", "ArrowUp")
    tab.page.fill("#stop-texts", "END\n###")
    tab.page.fill("#system", "Answer briefly.")
    tab.page.keyboard.press("Escape")
    server.steps = ["ok"]
    tab.send("hi")
    first = server.requests[0]
    assert first["messages"][0] == {"role": "system", "content": "Answer briefly."}
    named = {name: value for name, value in first.items() if name not in ("messages", "stream", "stream_options")}
    assert named == {"temperature": 0.9, "seed": 4294967295, "max_tokens": 2049, "stop": ["END", "###"]}
    tab.press(-1, "Regenerate")  # the same seed would give the same answer
    tab.wait_idle()
    assert tab.texts(".place") == ["2/2"]
    assert server.requests[1]["seed"] == 0
    tab.page.reload()
    tab.page.click("#settings-button")
    assert tab.page.input_value("#field-temperature") == "0.9"
    assert tab.page.input_value("#system") == "Answer briefly."
    tab.page.click("#reset")
    tab.page.keyboard.press("Escape")
    tab.send("again")
    assert set(server.requests[-1]) == {"messages", "stream", "stream_options"}
