"""One Chromium and one mock server for all tests of the chat page; every tab is a browser profile of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.mock_server import MockServer
from tests.browser.tab import Tab

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DEFAULTS: dict[str, Any] = {"locale": "en-US", "viewport": {"width": 1180, "height": 780}, "reduced_motion": "reduce"}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium fonts-noto-cjk")
    with api.sync_playwright() as playwright:
        # Where the tests run as root Chromium's own sandbox refuses to start; it opens nothing but the mock server.
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def running_server() -> Iterator[MockServer]:
    server = MockServer()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(running_server: MockServer) -> MockServer:
    running_server.reset()
    return running_server


@pytest.fixture
def open_tab(browser: Browser, server: MockServer) -> Iterator[Callable[..., Tab]]:
    """Opens the page in a new profile: `open_tab(locale="zh-CN", color_scheme="dark", before="script")`.

    At the end a test fails if any tab saw a dialog, an error, a violation of the content security policy, or a request
    to anywhere but the server.
    """
    tabs: list[Tab] = []

    def open_one(before: str = "", url: str = server.url, **options: Any) -> Tab:
        context = browser.new_context(**DEFAULTS | options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        if before:
            context.add_init_script(before)
        tabs.append(Tab(context, url))
        return tabs[-1]

    yield open_one
    problems = [problem for tab in tabs for problem in tab.problems]
    for tab in tabs:
        tab.context.close()
    assert problems == []


@pytest.fixture(scope="session")
def module_tab(browser: Browser, running_server: MockServer) -> Iterator[Tab]:
    """For tests that call modules of the page and leave the page itself as it is."""
    context = browser.new_context(**DEFAULTS)
    tab = Tab(context, running_server.url)
    yield tab
    context.close()
    assert tab.problems == []


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab()
