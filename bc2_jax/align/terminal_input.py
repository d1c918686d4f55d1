"""Reading what a person types in a terminal, with a history and several lines where prompt_toolkit is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

PROMPT = "> "
ReadMessage = Callable[[], str]
"""Waits for a message. Raises KeyboardInterrupt for Ctrl-C, which forgets what was typed, and EOFError for Ctrl-D."""


def make_reader(say: Callable[[str], object]) -> tuple[ReadMessage, bool]:
    """What reads messages from the terminal, and whether they can have several lines. `say` is given remarks."""
    if not (sys.stdout.isatty() and importlib.util.find_spec("prompt_toolkit")):
        with contextlib.suppress(ImportError):  # Windows has none; then lines can't be edited
            import readline  # noqa: F401  # importing it is enough: input() then edits lines
        return lambda: input(PROMPT), False
    try:
        return _make_editor(open_history()), True
    except OSError as error:
        say(f"what you type is not remembered: {error}")
        return _make_editor(None), True


def open_history() -> Path:
    """The file of what was typed, which nobody else may read: below XDG_STATE_HOME, or ~/.local/state.

    Raises OSError if it can't be written.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "bc2_jax" / "chat_history"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.fchmod(descriptor, 0o600)  # it may have been copied with other permissions
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
