"""The chat page in a browser tab, as a user sees it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page

TIMEOUT = 30_000  # ms; a busy machine may take that long for what usually takes a few

# Of a refused or broken request the browser itself writes this, whatever the page makes of it.
EXPECTED = re.compile(r"Failed to load resource: (the server responded with a status of|net::ERR_)|net::ERR_")


class Tab:
    """Opens `url` and notes in `problems` whatever must never happen there."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        context.set_default_timeout(TIMEOUT)
        self.context = context
        self.url = url
        self.problems: list[str] = []
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error('policy', event.violatedDirective))"
        )
        self.page = self.new_page()

    def new_page(self) -> Page:
        """Another tab of the same profile."""
        page = self.context.new_page()
        page.on("dialog", self.on_dialog)
        page.on("console", self.on_console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", lambda request: self.on_request(request.url))
        page.goto(self.url)
        page.wait_for_selector("#title:not(:empty)")
        return page

    def on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not EXPECTED.search(message.text):
            self.problems.append(f"console: {message.text}")

    def on_request(self, url: str) -> None:
        if not url.startswith((self.url, "data:")):
            self.problems.append(f"request: {url}")

    def send(self, text: str, wait: bool = True) -> None:
        """Types a message and presses Enter; waits for the end of the answer."""
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if wait:
            self.wait_idle()

    def wait_idle(self) -> None:
        self.page.wait_for_selector("#send:visible")

    def wait_text(self, selector: str, text: str) -> None:
        """Until an element that is shown contains `text`."""
        self.page.locator(selector, has_text=text).filter(visible=True).first.wait_for()

    def wait_true(self, expression: str) -> None:
        """Until an expression of JavaScript is true. `Page.wait_for_function` asks a second time by eval, which the
        page's own policy forbids."""
        self.wait_equal(lambda: bool(self.page.evaluate(expression)), True)

    def wait_equal(self, read: Callable[[], object], expected: object) -> None:
        """Until `read()` gives what is expected.

        For effects that come some time after the call: of taps, input methods, the clipboard, "back" and requests. A
        click or a key has had its effect when the call returns.
        """
        deadline = time.monotonic() + TIMEOUT / 1000
        while (found := read()) != expected and time.monotonic() < deadline:
            self.page.wait_for_timeout(20)
        assert found == expected

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def answers(self) -> list[str]:
        return self.texts(".assistant .body")

    def questions(self) -> list[str]:
        return self.texts(".user .body")

    def message(self, number: int) -> Locator:
        """The message at a place of the conversation, negative from its end."""
        return self.page.locator(".message").nth(number)

    def press(self, number: int, button: str) -> None:
        """Clicks a button of a message by its accessible name."""
        message = self.message(number)
        message.hover()
        message.get_by_role("button", name=button, exact=True).click()

    def module(self, name: str, body: str, argument: Any = None) -> Any:
        """Runs the body of an async function (module, argument) with a module of the page."""
        script = f"async (argument) => {{ const module = await import('/page/{name}.js'); {body} }}"
        return self.page.evaluate(script, argument)
