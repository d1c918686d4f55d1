"""What programs print, in processes of other locales and on consoles of other widths."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bc2_jax import terminal

ROOT = Path(terminal.__file__).parents[1]
CHINESE = "夜雨寄北 [v1] 🙂"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(code: str, *arguments: str | bytes, **environment: str) -> bytes:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    inherited |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=inherited, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [
        (ASCII, "utf-8"),
        ({"LC_ALL": "C"}, "utf-8"),
        ({"LC_ALL": "C.UTF-8"}, "utf-8"),
        ({**ASCII, "PYTHONIOENCODING": "gb18030"}, "gb18030"),
        ({**ASCII, "PYTHONIOENCODING": "gbk"}, "gbk"),
    ],
)
def test_every_character_is_printed(environment, encoding):
    code = f"""
import sys
from bc2_jax import terminal
terminal.use_utf8()
print({ascii(CHINESE)})
terminal.make_console().print({ascii(CHINESE)})
print({ascii(CHINESE)}, file=sys.stderr)
print("\\udce7")
"""
    printed = run(code, **environment)
    expected = CHINESE.encode(encoding, "backslashreplace")
    assert printed == expected + b"\n" + expected + b"\n\\udce7\n"


@pytest.mark.parametrize("environment", [ASCII, {"LC_ALL": "C.UTF-8"}], ids=["ascii", "utf-8"])
def test_arguments_are_utf8(environment):
    code = """
import sys
from bc2_jax import terminal
print(ascii(terminal.read_argument(sys.argv[1])))
try:
    terminal.read_argument(sys.argv[2])
except ValueError as error:
    print(error)
"""
    printed = run(code, CHINESE, b"\xc4\xe3", **environment).decode()
    assert printed.splitlines()[0] == ascii(CHINESE) and "is not valid: it is not UTF-8." in printed


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=80), st.sampled_from([30, 80]))
def test_tables_hold_every_character(text, width):
    """Markup, pictures and paths longer than the line."""
    table = terminal.make_table("path", "rows", title=f"of {text}", numbers_from=1)
    path = f"/data/[v1]/[red]{text}:smile:/end"
    table.add_row(path, "1,234")
    file = io.StringIO()
    # With the settings of make_console, which writes to standard output.
    console = Console(file=file, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)
    console.print(table)
    lines = file.getvalue().splitlines()
    cells = [line.split("│")[1].rstrip() for line in lines if line.startswith("│")]
    assert "".join(cells).replace(" ", "") == path
    assert lines[0].startswith(f"of {text}")


def test_a_console_prints_text_as_it_is(capsys):
    terminal.make_console().print("[v1] [red]x[/red] :smile: 1" + "x" * 300)
    assert capsys.readouterr().out == "[v1] [red]x[/red] :smile: 1" + "x" * 300 + "\n"


@pytest.mark.parametrize("is_on_path", [True, False], ids=["on PATH", "not on PATH"])
@pytest.mark.parametrize(
    "place", [ROOT, ROOT / "tools", Path(sys.prefix), Path("/")], ids=["root", "tools", "prefix", "/"]
)
def test_a_hint_can_be_typed_where_it_was_printed(place, is_on_path, monkeypatch):
    monkeypatch.chdir(place)
    folder = os.path.dirname(sys.executable)
    others = [entry for entry in os.environ["PATH"].split(os.pathsep) if entry != folder]
    monkeypatch.setenv("PATH", os.pathsep.join([folder, *others] if is_on_path else others))
    words = ["a b", "$(reboot)", "it's", "[v1]", "数据", "-x"]
    typed = terminal.command("tools/generate.py", *words)
    shown = subprocess.run(f"{typed} --help", shell=True, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: generate.py")
    interpreter, program, *rest = shlex.split(typed)
    assert Path(program).resolve() == ROOT / "tools/generate.py" and rest == words
    asked = subprocess.run([interpreter, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
    assert asked.stdout.strip() == sys.executable
