"""The commands of a conversation, answers as Markdown, and the program on a terminal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bc2_jax.align import terminal_chat
from bc2_jax.align.dialogue import Answer, Dialogue
from bc2_jax.align.terminal_chat import COMMANDS, talk
from bc2_jax.align.terminal_markdown import MarkdownScreen, make_markdown, replace_controls, settled
from tests.align.fake_chat_server import FakeChatServer, event, serving
from tests.programs import load_program

ROOT = Path(__file__).parents[2]
tool = load_program("generate")


class Talk:
    """A dialogue whose answers are 1, 2, 3 ..., and what was asked."""

    def __init__(self, monkeypatch, **settings):
        self.asked: list[tuple[list, dict]] = []
        self.fails = False
        self.dialogue = Dialogue(self._answer, "the mat", check=self._check, **settings)
        self._monkeypatch = monkeypatch

    def _check(self, settings) -> None:
        if settings.get("top_p", 1) > 1:
            raise ValueError("top_p is too large")

    def _answer(self, messages, on_text, settings) -> Answer:
        self.asked.append((messages, settings))
        if self.fails:
            raise OSError("the server is gone.")
        on_text(str(len(self.asked)))
        return Answer(str(len(self.asked)), "length" if len(self.asked) == 9 else "eos", 0, 0)

    def type(self, *lines: str) -> None:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        talk(self.dialogue)


@pytest.fixture
def typed(monkeypatch) -> Talk:
    return Talk(monkeypatch, temperature=0.5, seed=2**32 - 1)


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]


def test_regenerating_replaces_the_answer_with_another_seed(typed, capsys):
    typed.type("the cat", "/regenerate", "/regenerate", "the dog", "/regenerate")
    assert capsys.readouterr().out == "1\n2\n3\n4\n5\n"
    system = {"role": "system", "content": "the mat"}
    assert typed.dialogue.messages == [system, *said("the cat", "3", "the dog", "5")]
    assert [settings["seed"] for _, settings in typed.asked] == [2**32 - 1, 0, 1, 2**32 - 1, 0]
    assert typed.asked[4][0] == [system, *said("the cat", "3", "the dog")]


def test_what_was_not_answered_is_asked_again(typed, capsys):
    typed.fails = True
    with pytest.raises(OSError, match="the server is gone"):  # from a pipe; on a terminal it is a remark
        typed.type("the cat")
    assert typed.dialogue.messages[1:] == []
    typed.dialogue.messages += said("a", "b")
    with pytest.raises(ValueError, match="no answer to regenerate yet"):
        Dialogue(typed._answer).regenerate()
    with pytest.raises(OSError, match="the server is gone"):
        typed.type("/regenerate")
    assert typed.dialogue.messages[1:] == said("a", "b")


def test_the_system_text_is_changed_and_kept(typed):
    typed.type("the cat", "/system the log,  and more", "the dog", "/reset", "x", "/system", "y", "/system z", "/clear")
    systems = [messages[0] for messages, _ in typed.asked]
    log = {"role": "system", "content": "the log,  and more"}
    assert systems == [{"role": "system", "content": "the mat"}, log, log, {"role": "user", "content": "x"}]
    assert [len(messages) for messages, _ in typed.asked] == [2, 4, 2, 3]
    assert typed.dialogue.messages == [{"role": "system", "content": "z"}]


def test_settings_are_checked_and_taken_back(typed, capsys):
    changes = ["temperature 0.9", "top_k 7"], ["temperature", "top_k"]
    first, second = ([f"/settings {change}" for change in each] for each in changes)
    typed.type("/settings", *first, "x", *second, "y")
    assert [settings for _, settings in typed.asked] == [
        {"temperature": 0.9, "seed": 2**32 - 1, "top_k": 7}, {"temperature": 0.5, "seed": 2**32 - 1},
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines()[:2] == [
        f"[temperature 0.5, seed {2**32 - 1}; others are the model's]",
        f"[temperature 0.9, seed {2**32 - 1}; others are the model's]",
    ]
    for line, message in (
        ("/settings top_k 1.5", "top_k = '1.5' is not valid: it must be a whole number"),
        ("/settings top_p 2", "top_p is too large"),
        ("/settings heat 2", "the setting = 'heat' is not valid: it must be one of max_new_tokens, temp"),
        ("/settings top_k 1 2", "takes a name and a value"),
    ):
        with pytest.raises(ValueError, match=message):
            typed.type(line)
    assert typed.dialogue.settings == {"temperature": 0.5, "seed": 2**32 - 1}


def test_a_conversation_is_saved_once(typed, tmp_path, capsys):
    path = tmp_path / "a talk.json"
    typed.type("白日", f"/save {path}")
    saved = path.read_text(encoding="utf-8")
    assert json.loads(saved) == {"messages": typed.dialogue.messages} and "白日" in saved
    for name, message in ((path, "exists already"), ("", "needs the name"), (tmp_path / "no" / "talk", "No such file")):
        with pytest.raises((ValueError, OSError), match=message):
            typed.type("the dog", f"/save {name}")
    assert path.read_text(encoding="utf-8") == saved


def test_help_names_every_command_and_other_words_are_no_messages(typed, capsys):
    typed.type("/help", "/dog", " /dog", "/etc/mat", "/exit", "never")
    out, err = capsys.readouterr()
    assert out == "1\n2\n" and all(f"[{command}" in err for command in COMMANDS)
    assert [messages[-1]["content"] for messages, _ in typed.asked] == [" /dog", "/etc/mat"]


# ------------------------------------------------------------------------------------------------------------- Markdown

BLOCKS = [
    "# head\n",
    "a *b*\n",
    "\n",
    "- x\n",
    "- \n",
    "  y\n",
    "1. z\n",
    "2",
    "```\n",
    "| a | b |\n",
    "|---|---|\n",
    "---\n",
    ">q\n",
]


def shown(text: str) -> list[str]:
    """The lines that rich shows which are not blank."""
    console = Console(width=60, file=io.StringIO(), markup=False, emoji=False)
    console.print(make_markdown(text))
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


@given(st.lists(st.sampled_from(BLOCKS), max_size=14), st.randoms())
def test_what_is_settled_does_not_change(blocks, random):
    """However the text is cut into pieces, the parts show what the whole does."""
    text, parts, rest = "".join(blocks), [], ""
    while text:
        cut = random.randint(1, len(text))
        rest, text = rest + text[:cut], text[cut:]
        count = settled(rest)
        if count:
            parts.append(rest[:count])
            rest = rest[count:]
    assert [line for part in [*parts, rest] for line in shown(part)] == shown("".join(blocks))


def test_an_answer_stays_on_the_terminal_whole():
    """Though only its end is in view while it is written, on a terminal of 10 lines."""
    console = Console(width=70, height=10, file=io.StringIO(), force_terminal=True, markup=False, emoji=False)
    lines = [f"- line {i}" for i in range(30)]
    with MarkdownScreen(console) as screen:
        screen.add("# Head\n\n<b>[bold]tag[/bold] :smile:</b> [text](http://there)\n\n")
        for line in lines:
            screen.add(line + "\n")
        rows = [row for row in console.render_lines(screen._newest()) if "".join(s.text for s in row).strip()]
        assert len(rows) == 8 and "line 29" in "".join(s.text for s in rows[-1])
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "<b>[bold]tag[/bold] :smile:</b> text (http://there)" in printed
    assert all(f"line {i}" in printed.rsplit("\N{BULLET} line 0", 1)[1] for i in range(1, 30))
    assert printed.count("Head") == 1


def test_nothing_is_lost_when_printing_is_interrupted(monkeypatch):
    console = Console(width=70, file=io.StringIO())
    with MarkdownScreen(console) as screen, monkeypatch.context() as patch:
        patch.setattr(console, "print", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            screen.add("one\n\ntwo\n")
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == ["one", "", "two"]


def test_a_model_cannot_command_the_terminal():
    assert replace_controls("a\x1b]52;c;x\x07\r\n\tb\x9b") == "a\ufffd]52;c;x\ufffd\n\tb\ufffd"


def test_the_history_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = terminal_chat.open_history()
    path.write_text("kept")
    path.chmod(0o644)
    assert terminal_chat.open_history() == path and path.read_text() == "kept"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


# ---------------------------------------------------------------------------------------------------------- the program


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with serving() as server:
        yield server


def test_a_server_answers_a_pipe(server, capsys, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("# mine\nme 0123456789abcdef\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe dog\n"))
    monkeypatch.setenv("BC2_API_KEY", "fedcba9876543210")
    arguments = ["--chat", "--url", server.url, "--system", "the mat", "--greedy", "--stop", "end"]
    assert tool.main([*arguments, "--api-key-file", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out == "yes\nyes\n" and set(server.keys) == {"Bearer 0123456789abcdef"}
    system = {"role": "system", "content": "the mat"}
    assert server.asked[1] == {
        "model": "tiny", "messages": [system, *said("the cat", "yes", "the dog")], "stream": True, "temperature": 0.0,
        "repetition_penalty": 1.0, "stop": ["end"],
    }  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert tool.main(["--chat", "--url", server.url]) == 0 and server.keys[-1] == "Bearer fedcba9876543210"
    server.reply = lambda handler, body: handler.refuse(503, "the server is loading; try again later.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert tool.main(["--chat", "--url", server.url]) == 1
    out, err = capsys.readouterr()
    assert out == "yes\n" and err == (
        f"error: the server at {server.url} refuses (503): the server is loading; try again later.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat"], "there is no model: name a CHECKPOINT, or a server with --chat --url URL."),
        (["--url", "http://x"], "--url belongs to --chat."),
        (["model", "--chat", "--url", "http://x"], "CHECKPOINT does not go with --url"),
        (["--chat", "--url", "http://x", "--long-context", "ntk"], "--long-context does not go with --url"),
        (["model", "--chat", "--api-key-file", "f"], "--api-key-file belongs to --url."),
        (["--chat", "--url", "x"], "--url = 'x' is not valid"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, capsys):
    assert tool.main(arguments) == 1
    assert f"error: {message}" in capsys.readouterr().err


class Terminal:
    """The program on a terminal of 24 lines."""

    def __init__(self, url: str, state: Path):
        self.main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {
            **os.environ,
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "XDG_STATE_HOME": str(state),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--chat", "--url", url]
        # A session of its own, so that Ctrl-C is the terminal's and reaches the program alone.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command], stdin=other, stdout=other, stderr=other, env=environment
        )
        os.close(other)
        self.seen, self.done = b"", 0

    def wait_for(self, wanted: str, seconds: float = 60) -> None:
        """Reads until this is on the terminal, after what was waited for before."""
        end = time.monotonic() + seconds
        while True:
            text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen.decode(errors="replace"))
            if (at := text.find(wanted, self.done)) >= 0:
                self.done = at + len(wanted)
                return
            assert time.monotonic() < end, f"no {wanted!r} in {text[self.done :]!r}"
            if select.select([self.main], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    self.seen += os.read(self.main, 2**16)

    def type(self, keys: str) -> None:
        os.write(self.main, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.main)


def test_on_a_terminal(server, tmp_path):
    """Several lines in a message, Ctrl-C in an answer and at the prompt, what fails, and the end."""

    def endless(handler, body):
        write = handler.stream()
        with contextlib.suppress(OSError):
            while True:
                write(event("word "))
                time.sleep(0.02)
        handler.close_connection = True

    server.reply = lambda handler, body: handler.say("**白日**\n\n", "# Next\n")
    terminal = Terminal(server.url, tmp_path)
    try:
        terminal.wait_for("talking with tiny")
        terminal.wait_for(">")
        terminal.type("one\ntwo\x1b\rthree\r")
        terminal.wait_for("Next")
        assert server.asked[0]["messages"] == said("one\ntwo\nthree")
        terminal.wait_for(">")
        server.reply = endless
        terminal.type("more\r")
        terminal.wait_for("word word")
        terminal.type("\x03")
        terminal.wait_for("[stopped; what was said is kept]")
        terminal.wait_for(">")
        server.reply = lambda handler, body: handler.refuse(503, "the server is draining.")
        terminal.type("begun\x03")
        terminal.wait_for("begun")  # the old prompt is drawn once more
        terminal.wait_for(">")
        terminal.type("again\r")
        terminal.wait_for("refuses (503)")
        terminal.wait_for(">")
        server.reply = lambda handler, body: handler.say("at last")
        terminal.type("/regenerate\r")
        terminal.wait_for("at last")
        texts = [message["content"] for message in server.asked[-1]["messages"]]
        assert texts[:3] == ["one\ntwo\nthree", "**白日**\n\n# Next\n", "more"] and texts[4:] == ["again"]
        assert texts[3].startswith("word word ")
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
        history = (tmp_path / "bc2_jax" / "chat_history").read_text()
        assert "+one\n+two\n+three\n" in history and "begun" not in history
    finally:
        terminal.close()
