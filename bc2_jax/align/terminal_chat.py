"""Chat in the terminal with commands, line editing and Markdown, or from a pipe with one user message a line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from bc2_jax.align.dialogue import NUMBERS, Answer, Dialogue, OnText, read_setting
from bc2_jax.align.terminal_markdown import MarkdownScreen, can_show_markdown, make_screen_console, replace_controls
from bc2_jax.terminal import read_argument
from bc2_jax.validation import require

PROMPT = "> "
ReadMessage = Callable[[], str]
"""Reads a message. Raises KeyboardInterrupt for Ctrl-C, which discards the input, and EOFError for Ctrl-D."""
Ask = Callable[[OnText], Answer]
Show = Callable[[Ask], Answer]
"""Gets an answer and shows it while it is written."""

COMMANDS = {
    "/system": "/system TEXT sets the system text from the next answer on; without TEXT it removes it",
    "/reset": "/reset clears the conversation, but not the system text",
    "/regenerate": "/regenerate replaces the newest answer, or repeats an unanswered message",
    "/save": "/save FILE writes the messages to a new file, as JSON",
    "/settings": "/settings shows the settings, /settings NAME VALUE changes one, /settings NAME resets it",
    "/help": "/help lists the commands",
    "/exit": "/exit or Ctrl-D ends the conversation, Ctrl-C stops an answer",
}
_SAME = {"/clear": "/reset"}
"""Other names of commands."""
HINT = "/help lists the commands, /exit or Ctrl-D ends the conversation, Ctrl-C stops an answer"
_NEW_LINE = "Enter sends a message, Alt-Enter or Ctrl-J begins a new line in it"


def talk(dialogue: Dialogue) -> None:
    """Reads user messages from standard input until it ends, and streams the answers to standard output.

    On a terminal, answers are shown as Markdown and an error is a remark, so that the user can try again. From a pipe,
    a line is a message, each answer ends with a newline, and errors are raised: ValueError and OSError as
    `Dialogue.ask`. Remarks go to standard error.
    """
    if not sys.stdin.isatty():
        chat = _Chat(dialogue, plain)
        for line in sys.stdin:
            if not chat.read(line.rstrip("\r\n")):
                return
        return
    console = make_screen_console()
    chat = _Chat(dialogue, _markdown_on(console) if can_show_markdown(console) else plain)
    read, has_lines = make_reader(remark)
    remark(f"{HINT}; {_NEW_LINE}" if has_lines else HINT)
    for line in _typed(read):
        try:
            if not chat.read(line):
                return
        except (ValueError, OSError) as error:
            remark(str(error))
        except KeyboardInterrupt:  # a second one, or between two answers
            remark("stopped")


def _typed(read: ReadMessage) -> Iterator[str]:
    while True:
        try:
            yield read()
        except KeyboardInterrupt:  # discards the line
            print()
        except EOFError:
            print()
            return


def plain(answer: Ask) -> Answer:
    """Prints an answer while it is written, then a newline."""
    found, is_begun, is_terminal = None, False, sys.stdout.isatty()

    def write(text: str) -> None:
        nonlocal is_begun
        is_begun = True
        print(replace_controls(text) if is_terminal else text, end="", flush=True)

    try:
        found = answer(write)
    finally:
        if is_begun or found is not None:
            print(flush=True)
    return found


def _markdown_on(console: Console) -> Show:
    def show(answer: Ask) -> Answer:
        with MarkdownScreen(console) as screen:
            return answer(screen.add)

    return show


def remark(text: str) -> None:
    """Prints a remark to standard error."""
    print(f"[{replace_controls(text)}]", file=sys.stderr, flush=True)


class _Chat:
    """Interprets lines as commands and messages."""

    def __init__(self, dialogue: Dialogue, show: Show):
        self._dialogue, self._show = dialogue, show
        self._first_settings = dict(dialogue.settings)
        self._dropped = 0
        """Rounds already reported as dropped."""
        self._unanswered: str | None = None

    def read(self, line: str) -> bool:
        """Runs a line; returns False at the end of the conversation. A line that begins with a space is a message."""
        line = read_argument(line)
        words = line.split(maxsplit=1)
        if not words:
            return True
        name = _SAME.get(words[0], words[0])
        if line[0] == "/" and name[1:].isalpha():
            return self._run(name, words[1].strip() if len(words) > 1 else "")
        self._ask(line)
        return True

    def _run(self, name: str, rest: str) -> bool:
        match name:
            case "/exit":
                return False
            case "/help":
                for text in COMMANDS.values():
                    remark(text)
            case "/reset":
                self._dialogue.clear()
                self._dropped, self._unanswered = 0, None
                remark("the conversation begins again")
            case "/system":
                self._dialogue.system = rest
                remark("the system text is set" if rest else "there is no system text")
            case "/regenerate":
                self._regenerate()
            case "/save":
                self._save(rest)
            case "/settings":
                self._set(rest.split())
            case _:
                legal = ", ".join(COMMANDS)
                remark(f"{name} is not a command: legal are {legal}; a message may begin with a space")
        return True

    def _ask(self, text: str) -> None:
        self._unanswered = text
        self._explain(self._show(lambda on_text: self._dialogue.ask(text, on_text)))

    def _regenerate(self) -> None:
        if self._unanswered is not None:
            self._ask(self._unanswered)
        else:
            self._explain(self._show(self._dialogue.regenerate))

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a new file.")
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump({"messages": self._dialogue.messages}, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except FileExistsError as error:
            raise ValueError(f"{path} exists already: name a new file.") from error
        remark(f"{len(self._dialogue.messages)} messages are in {path}")

    def _set(self, words: list[str]) -> None:
        settings = dict(self._dialogue.settings)
        if len(words) > 2:
            raise ValueError("/settings takes a name and a value.")
        if words:
            name = words[0]
            require(name in NUMBERS, "the setting", name, f"it must be one of {', '.join(NUMBERS)}")
            if len(words) == 2:
                settings[name] = read_setting(name, words[1])
            elif name in self._first_settings:
                settings[name] = self._first_settings[name]
            else:
                settings.pop(name, None)
            self._dialogue.change(settings)
        shown = ", ".join(f"{name} {settings[name]}" for name in NUMBERS if name in settings)
        remark(f"{shown}; others are the model's" if shown else "all settings are the model's")

    def _explain(self, found: Answer) -> None:
        """Reports what had no room in the prompt, and why an answer is incomplete."""
        if found.reason == "interrupted" and not found.text:
            remark("stopped before it said anything; /regenerate asks again")
            return
        self._unanswered = None
        if found.reason == "interrupted":
            remark("stopped; what was said is kept")
            return
        if found.dropped_rounds != self._dropped:
            rounds = "round has" if found.dropped_rounds == 1 else f"{found.dropped_rounds} rounds have"
            remark(f"the oldest {rounds} no room: the model did not see that")
        if found.cut_tokens:
            remark(f"the first {found.cut_tokens} tokens of the prompt have no room: the model did not see them")
        if found.reason == "length":
            remark("the answer was cut at max_new_tokens")
        self._dropped = found.dropped_rounds


# --------------------------------------------------------------------------------------------------------------- input


def make_reader(say: Callable[[str], object]) -> tuple[ReadMessage, bool]:
    """(function that reads a message from the terminal, whether messages may have several lines). `say` gets
    remarks."""
    if not (sys.stdout.isatty() and importlib.util.find_spec("prompt_toolkit")):
        with contextlib.suppress(ImportError):  # missing on Windows
            import readline  # noqa: F401  # the import enables line editing in input()
        return lambda: input(PROMPT), False
    try:
        return _make_editor(open_history()), True
    except OSError as error:
        say(f"what you type is not remembered: {error}")
        return _make_editor(None), True


def open_history() -> Path:
    """The file of the input history, readable only by its owner, below XDG_STATE_HOME or ~/.local/state. Raises OSError
    if it can't be written."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "bc2_jax" / "chat_history"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.fchmod(descriptor, 0o600)  # of an existing file
    finally:
        os.close(descriptor)
    return path


def _make_editor(history: Path | None) -> ReadMessage:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        PROMPT,
        history=InMemoryHistory() if history is None else FileHistory(str(history)),
        key_bindings=keys,
        prompt_continuation=" " * len(PROMPT),
    )
    return session.prompt
