"""Shows an answer as Markdown on a terminal while it is written.

The last block, which can still change, is redrawn in place with its newest lines in view. Every block before it is
printed once and stays in the scrollback.
"""

from __future__ import annotations

import contextlib
import re
from types import TracebackType

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Without HTML, which rich would not show.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def replace_controls(text: str) -> str:
    """Replaces control characters, such as escape sequences."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def make_markdown(text: str) -> Markdown:
    """Markdown for rich, with visible addresses of links."""
    markdown = Markdown("", hyperlinks=False)
    markdown.parsed = _PARSER.parse(text)
    return markdown


def settled(text: str) -> int:
    """Number of characters in blocks that no longer change: all but the last block and an unfinished line."""
    whole = text[: text.rfind("\n") + 1]
    blocks = [token for token in _PARSER.parse(whole) if token.level == 0 and token.nesting >= 0]
    if len(blocks) < 2 or blocks[-1].map is None:
        return 0
    return sum(len(line) + 1 for line in whole.split("\n")[: blocks[-1].map[0]])


class _Lines:
    """Rendered lines without blank ones at both ends; with `newest`, only the last ones that fit the terminal."""

    def __init__(self, shown: Markdown | Text, newest: bool = False):
        self._shown, self._newest = shown, newest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Leave room for the ^C that a terminal writes at the end of a line.
        narrower = options.update(width=max(options.max_width - len("^C"), 1), height=None)
        lines = console.render_lines(self._shown, narrower, pad=False)
        written = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[written[0] : written[-1] + 1] if written else []
        for line in lines[-max(console.height - 2, 1) :] if self._newest else lines:
            yield from line
            yield Segment.line()


class MarkdownScreen:
    """Context manager: `add` shows text as it comes; at the end all text is on the terminal."""

    def __init__(self, console: Console):
        self._console = console
        self._settled = self._text = ""
        """Blocks to print, and text that can still change."""
        self._is_begun = False
        self._live: Live | None = None

    def __enter__(self) -> MarkdownScreen:
        self._live = Live(
            get_renderable=self._newest, console=self._console, transient=True, refresh_per_second=10,
            vertical_overflow="crop",
        )  # fmt: skip
        self._live.start(refresh=True)
        return self

    def add(self, text: str) -> None:
        self._text += replace_controls(text)
        if "\n" in text and (count := settled(self._text)):
            self._settled, self._text = self._text[:count], self._text[count:]
            if self._live is not None:
                self._live.refresh()  # printing redraws what was shown last
            self._print_settled()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._live is not None
        self._live.stop()
        # Ctrl-C may have interrupted printing.
        self._settled, self._text = self._settled + self._text, ""
        self._print_settled()

    def _newest(self) -> _Lines:
        waiting = Text("\N{HORIZONTAL ELLIPSIS}", "dim")
        return _Lines(make_markdown(self._text) if self._text.strip() else waiting, newest=True)

    def _print_settled(self) -> None:
        if self._settled.strip():
            if self._is_begun:
                self._console.print()
            self._console.print(_Lines(make_markdown(self._settled)))
            self._is_begun = True
        self._settled = ""


def make_screen_console() -> Console:
    """A console that does not interpret rich's markup, emoji names or numbers."""
    return Console(markup=False, emoji=False, highlight=False)


def can_show_markdown(console: Console) -> bool:
    """Whether the console can redraw text."""
    with contextlib.suppress(ValueError):  # a closed standard output
        return console.is_terminal and not console.is_dumb_terminal
    return False
