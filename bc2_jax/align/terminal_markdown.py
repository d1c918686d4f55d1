"""An answer on a terminal as Markdown, while it is written.

What can change is shown in place: the last block, of which the newest lines are kept in view. Every block before it is
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
# Without HTML, which would not be shown at all.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def replace_controls(text: str) -> str:
    """`text` without characters that command a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))


def make_markdown(text: str) -> Markdown:
    """What rich shows of a text; addresses of links are shown, never hidden behind their text."""
    markdown = Markdown("", hyperlinks=False)
    markdown.parsed = _PARSER.parse(text)
    return markdown


def settled(text: str) -> int:
    """How many characters of a text that still grows are blocks that no longer change.

    The last block, and the last line while it is not whole, may.
    """
    whole = text[: text.rfind("\n") + 1]
    blocks = [token for token in _PARSER.parse(whole) if token.level == 0 and token.nesting >= 0]
    if len(blocks) < 2 or blocks[-1].map is None:
        return 0
    return sum(len(line) + 1 for line in whole.split("\n")[: blocks[-1].map[0]])


class _Lines:
    """The lines of something without blank ones at both ends, which rich has around some blocks; `newest` are as many
    of the last ones as the terminal has room for."""

    def __init__(self, shown: Markdown | Text, newest: bool = False):
        self._shown, self._newest = shown, newest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # A line that fills its row would be broken by the ^C that the terminal writes behind it.
        narrower = options.update(width=max(options.max_width - len("^C"), 1), height=None)
        lines = console.render_lines(self._shown, narrower, pad=False)
        written = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[written[0] : written[-1] + 1] if written else []
        for line in lines[-max(console.height - 2, 1) :] if self._newest else lines:
            yield from line
            yield Segment.line()


class MarkdownScreen:
    """A context in which `add` shows text as it comes; at its end all of it stands on the terminal."""

    def __init__(self, console: Console):
        self._console = console
        self._settled = self._text = ""
        """What is to be printed, and what can still change."""
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
        """More of the answer."""
        self._text += replace_controls(text)
        if "\n" in text and (count := settled(self._text)):
            self._settled, self._text = self._text[:count], self._text[count:]
            if self._live is not None:
                self._live.refresh()  # printing draws again what it showed last
            self._print_settled()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._live is not None
        self._live.stop()
        # Ctrl-C may have come before the last of it was printed.
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
    """A console for answers: what looks like rich's own markup or a name of a picture stays as it is."""
    return Console(markup=False, emoji=False, highlight=False)


def can_show_markdown(console: Console) -> bool:
    """Whether text can be replaced on it."""
    with contextlib.suppress(ValueError):  # a closed standard output
        return console.is_terminal and not console.is_dumb_terminal
    return False
