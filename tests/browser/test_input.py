"""Enter and input methods, languages, colours, small screens, scrolling, keyboard."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from tests.browser.mock_server import MockServer
from tests.browser.tab import Tab

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}
WIDE = "| a | b |\n|---|---|\n| " + "long " * 60 + "| x |\n\n```\n" + "y" * 400 + "\n```\n\n" + "z" * 400


def compose(tab: Tab, selector: str, chosen: str) -> None:
    """Types letters into an input method, presses Enter inside it, and then takes the words it offers."""
    session = tab.context.new_cdp_session(tab.page)
    tab.page.focus(selector)
    session.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229, "nativeVirtualKeyCode": 229}
    session.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    session.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
    session.send("Input.insertText", {"text": chosen})
    tab.wait_equal(lambda: tab.page.input_value(selector), chosen)


def test_enter_of_an_input_method_does_not_send(tab: Tab, server: MockServer) -> None:
    compose(tab, "#input", "你好")
    assert tab.questions() == []
    tab.page.press("#input", "Enter")
    tab.wait_idle()
    assert tab.questions() == ["你好"] and len(server.requests) == 1


def test_escape_of_an_input_method_does_not_stop_the_answer(tab: Tab, server: MockServer) -> None:
    server.steps = ["a", threading.Event()]
    tab.send("hi", wait=False)
    tab.wait_text(".assistant .body", "a")
    session = tab.context.new_cdp_session(tab.page)
    session.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    escape = {"key": "Escape", "code": "Escape", "windowsVirtualKeyCode": 229, "nativeVirtualKeyCode": 229}
    session.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **escape})
    tab.page.wait_for_timeout(50)
    assert tab.page.is_visible("#stop")
    session.send("Input.insertText", {"text": "你"})
    tab.page.keyboard.press("Escape")
    tab.wait_idle()


def test_enter_that_safari_sends_after_a_composition_does_not_send(tab: Tab, server: MockServer) -> None:
    """Its keydown is no longer marked as composing; the key code is."""
    tab.page.fill("#input", "你好")
    press = """code => document.querySelector('#input').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', keyCode: code}))"""
    tab.page.evaluate(press, 229)
    assert tab.questions() == []
    tab.page.evaluate(press, 13)
    tab.wait_idle()
    assert tab.questions() == ["你好"]


def test_input_methods_in_an_edited_message_and_a_title(tab: Tab, server: MockServer) -> None:
    tab.send("hello")
    tab.press(0, "Edit")
    tab.page.fill(".editor textarea", "")
    compose(tab, ".editor textarea", "你好")
    tab.page.press(".editor textarea", "Enter")
    tab.wait_idle()
    assert tab.questions() == ["你好"]
    tab.page.hover("#chats .title")
    tab.page.get_by_role("button", name="Rename").click()
    tab.page.fill("#chats input", "")
    compose(tab, "#chats input", "问候")
    tab.page.press("#chats input", "Enter")
    assert tab.texts("#chats .title") == ["问候"]


def test_shift_enter_starts_a_line(tab: Tab, server: MockServer) -> None:
    tab.page.type("#input", "a")
    height = tab.page.locator("#input").bounding_box()
    tab.page.press("#input", "Shift+Enter")
    tab.page.type("#input", "b")
    taller = tab.page.locator("#input").bounding_box()
    assert height and taller and taller["height"] > height["height"]
    tab.page.press("#input", "Enter")
    tab.wait_idle()
    assert tab.questions() == ["a\nb"]
    tab.page.fill("#input", " \n ")
    tab.page.press("#input", "Enter")
    assert len(server.requests) == 1


def test_both_languages_have_every_label(tab: Tab) -> None:
    names = tab.module("labels", "const {en, zh} = module.LANGUAGES; return [Object.entries(en), Object.entries(zh)]")
    english, chinese = map(dict, names)
    assert english.keys() == chinese.keys()
    fields = "const find = (text) => (text.match(/\\{\\w+\\}/g) ?? []).sort().join(); return argument.map(find)"
    assert tab.module("labels", fields, [*english.values()]) == tab.module("labels", fields, [*chinese.values()])


def test_the_language_is_the_browsers_and_can_be_switched(open_tab: Callable[..., Tab], server: MockServer) -> None:
    tab = open_tab(locale="zh-CN")
    assert tab.page.get_attribute("html", "lang") == "zh-CN"
    assert tab.page.get_attribute("#input", "placeholder") == "输入消息"
    server.steps = [threading.Event()]
    tab.send("你好", wait=False)
    tab.wait_text(".state", "正在发送…")
    tab.page.click("#stop")
    tab.wait_text(".state", "已停止")
    tab.page.click("#language")
    assert tab.texts(".state:visible") == ["Stopped"]
    assert tab.page.get_attribute("#input", "placeholder") == "Write a message"
    tab.page.reload()
    tab.page.wait_for_selector(".message")
    assert tab.texts(".state:visible") == ["Stopped"]


def pixels(tab: Tab) -> np.ndarray:
    return np.asarray(image.imread(io.BytesIO(tab.page.screenshot()), format="png"))[..., :3]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system(open_tab: Callable[..., Tab], server: MockServer, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme)
    tab.send("colours")
    picture = pixels(tab)
    light = (picture.mean(axis=-1) > 0.8).mean()
    assert light > 0.9 if scheme == "light" else light < 0.05
    contrast = """() => [...document.querySelectorAll('.body, .tools, #hint, #title, #chats .title')].map((element) => {
        const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => {
            c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
        const both = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
        return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05); })"""
    assert min(tab.page.evaluate(contrast)) >= 4.5  # WCAG 2.2, level AA


@pytest.mark.parametrize("width", [390, 1180])
def test_nothing_is_wider_than_the_screen(open_tab: Callable[..., Tab], server: MockServer, width: int) -> None:
    tab = open_tab(**PHONE if width == 390 else {})
    server.steps = [WIDE]
    tab.send("w" * 300)
    widest = "Math.max(document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth)"
    assert tab.page.evaluate(widest) <= width
    sizes = """[...document.querySelectorAll('textarea, input:not([type=checkbox])')]
        .map((element) => parseFloat(getComputedStyle(element).fontSize))"""
    tab.page.click("#settings-button")
    assert min(tab.page.evaluate(sizes)) >= 16  # less makes a phone zoom in
    assert tab.page.evaluate(widest) <= width
    box = tab.page.locator("#settings").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
    if width == 390:
        tab.page.set_viewport_size({"width": 320, "height": 568})
        assert tab.page.evaluate(widest) <= 320


def test_a_phones_list_of_conversations_opens_over_the_page(open_tab: Callable[..., Tab], server: MockServer) -> None:
    tab = open_tab(**PHONE)
    tab.send("one")
    assert tab.page.get_attribute("#menu", "aria-expanded") == "false"
    assert tab.page.evaluate("document.querySelector('#sidebar').inert")
    tab.page.tap("#menu")
    tab.page.tap("#new")
    tab.wait_equal(tab.questions, [])
    assert tab.page.evaluate("document.querySelector('#sidebar').inert")
    tab.page.tap("#menu")
    tab.page.tap("#chats .title")
    tab.wait_equal(tab.questions, ["one"])
    tab.page.tap("#menu")
    tab.page.wait_for_selector("#shade:visible")
    tab.page.touchscreen.tap(380, 400)
    tab.page.wait_for_selector("#menu[aria-expanded=false]")


def test_the_end_is_followed_until_the_user_scrolls_up(tab: Tab, server: MockServer) -> None:
    gates = [threading.Event() for _ in range(3)]
    lines = [f"line {number}\n\n" for number in range(60)]
    server.steps = [*lines, gates[0], *lines, "END", gates[1], *lines, gates[2]]
    tab.send("long", wait=False)
    left = "(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.querySelector('#scroll'))"
    tab.wait_text(".assistant .body", "line 59")
    tab.wait_true(f"{left} < 2")
    tab.page.hover("#scroll")
    tab.page.mouse.wheel(0, -400)
    tab.page.wait_for_selector("#to-end:visible")
    top = tab.page.evaluate("document.querySelector('#scroll').scrollTop")
    gates[0].set()
    tab.wait_text(".assistant .body", "END")
    assert tab.page.evaluate("document.querySelector('#scroll').scrollTop") == top
    tab.page.click("#to-end")
    gates[1].set()
    gates[2].set()
    tab.wait_idle()
    tab.wait_true(f"{left} < 2")
    assert not tab.page.is_visible("#to-end")


def test_every_control_has_a_name_and_is_reached_by_tab(tab: Tab, server: MockServer) -> None:
    server.steps = ["```js\n1\n```"]
    tab.send("hi")
    unnamed = """[...document.querySelectorAll('button, textarea, input')]
        .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.getAttribute('aria-labelledby')))
        .map((e) => e.outerHTML)"""
    assert tab.page.evaluate(unnamed) == []
    tab.page.focus("#new")
    names = set()
    for _ in range(25):
        tab.page.keyboard.press("Tab")
        names.add(
            tab.page.evaluate(
                "document.activeElement.id || document.activeElement.title || document.activeElement.tagName"
            )
        )
    expected = {
        "language",
        "settings-button",
        "input",
        "Rename",
        "Delete",
        "Edit",
        "Copy",
        "Copy code",
        "Regenerate",
        "PRE",
    }
    assert expected <= names
    tab.page.keyboard.press("Control+Shift+O")
    assert tab.questions() == [] and tab.page.evaluate("document.activeElement.id") == "input"
