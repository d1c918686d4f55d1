"""A conversation in the terminal, or from a pipe: one user message a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from bc2_jax.align.conversation import Answer, Conversation
from bc2_jax.terminal import read_argument

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
_COMMANDS = ("/clear", "/exit", "/help")


def talk(conversation: Conversation) -> None:
    """Reads user messages from standard input until it ends, and streams the answers to standard output.

    On a terminal it asks for each message. From a pipe a line is a message and each answer is followed by a newline,
    with nothing between. Remarks go to standard error. Raises ValueError, as `Conversation.ask`, for what can't be
    asked at all.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _remark(HELP)
    dropped = 0
    for line in _lines(sys.stdin, is_terminal):
        command = line.strip()
        if not command:
            continue
        if command == "/exit":
            return
        if command in ("/clear", "/help"):
            if command == "/clear":
                conversation.clear()
                dropped = 0
            _remark(HELP if command == "/help" else "the conversation begins again")
            continue
        if command.startswith("/") and command[1:].isalpha():
            _remark(f"{command} is not a command: legal are {', '.join(_COMMANDS)}")
            continue
        found = conversation.ask(read_argument(line), lambda text: print(text, end="", flush=True))
        print(flush=True)
        dropped = _explain(found, dropped)


def _lines(stdin: TextIO, is_terminal: bool) -> Iterator[str]:
    if not is_terminal:
        yield from (line.rstrip("\r\n") for line in stdin)
        return
    with contextlib.suppress(ImportError):  # Windows has none; then lines can't be edited
        import readline  # noqa: F401  # importing it is enough: input() then edits lines
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:  # forgets the line that was begun
            print()
        except EOFError:
            print()
            return


def _explain(found: Answer, dropped: int) -> int:
    """Says what the model did not see and why an answer is not whole; returns how many rounds it did not see."""
    if found.reason == "interrupted":
        _remark("stopped; what was said is kept" if found.text else "stopped; the question is forgotten")
        return dropped
    if found.dropped_rounds != dropped:
        rounds = "round has" if found.dropped_rounds == 1 else f"{found.dropped_rounds} rounds have"
        _remark(f"the oldest {rounds} no room: the model did not see that")
    if found.cut_tokens:
        _remark(f"the first {found.cut_tokens} tokens of the prompt have no room: the model did not see them")
    if found.reason == "length":
        _remark("the answer was cut at --max-new-tokens")
    return found.dropped_rounds


def _remark(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
