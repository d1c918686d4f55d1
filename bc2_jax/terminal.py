"""Terminal output of the programs: encoding, consoles, tables, and commands that can be pasted back."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bc2_jax.validation import require_local

_CHECKOUT = Path(__file__).parents[1]
# Width of a table in a file or pipe.
_WIDTH = 160


def use_utf8() -> None:
    """Makes standard output and error accept every character in any locale; call it first in a program.

    In an ASCII locale (LC_ALL=C) they write UTF-8 unless PYTHONIOENCODING is set. Characters that another encoding
    lacks are written as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook has put its own
            is_ascii = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors="backslashreplace")


def run_program(
    run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Runs `run` with the parsed arguments (`argv`, default sys.argv) and returns the exit code.

    ValueError and OSError are printed without a traceback: 1. Ctrl-C: 130.
    """
    use_utf8()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def read_argument(text: str) -> str:
    """A command-line argument as text, decoded from UTF-8 even in an ASCII locale; not for paths.

    Raises ValueError for bytes that are not UTF-8.
    """
    if not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the argument {text!r} is not valid: it is not UTF-8.") from error


def local_path(text: str) -> Path:
    """The path of an argument, as `type=` of argparse; a URL is refused, of which Path would make another path."""
    try:
        require_local("the path", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A rich console that prints text unchanged: no markup, no emoji, no line breaks.

    Tables are 160 columns wide if neither a terminal nor COLUMNS gives a width.
    """
    is_known = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(
        stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True,
        width=None if is_known else _WIDTH,
    )  # fmt: skip


def log_to_stderr() -> Console:
    """Prints log records from INFO on to a console on standard error; returns the console."""
    from rich.logging import RichHandler

    console = make_console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    return console


def make_table(*headers: str, title: str | None = None, numbers_from: int | None = None) -> Table:
    """A table that wraps long cells instead of cutting them; the header row is hidden if all headers are empty.

    Columns from index `numbers_from` on are right-aligned.
    """
    table = Table(title=title, title_justify="left", show_header=any(headers))
    for index, header in enumerate(headers):
        add_column(table, header, is_number=numbers_from is not None and index >= numbers_from)
    return table


def add_column(table: Table, header: str, *, is_number: bool = False) -> None:
    """Adds a column to a table from `make_table`."""
    table.add_column(header, overflow="fold", justify="right" if is_number else "left")


def here(path: str | Path) -> str:
    """`path` as typed in the current directory: relative if it is below it, else absolute.

    In the root directory it is always absolute: Python started with a relative path there reports itself as `//NAME`.
    """
    path, current = os.path.abspath(path), os.getcwd()
    is_below = current != os.path.abspath(os.sep) and path.startswith(os.path.join(current, ""))
    return os.path.relpath(path, current) if is_below else path


def program_words(path: str) -> list[str]:
    """The words that run a program as a process of this Python; of a checkout its file, else a subcommand of `bc2`.

    `path` is the file's in a checkout, such as "tools/convert.py".
    """
    if (file := _CHECKOUT / path).is_file():
        return [sys.executable, str(file)]
    return [sys.executable, "-m", "bc2_jax", subcommand(path)]


def command(path: str, *words: object) -> str:
    """What to type in the current directory to run a program, each word quoted for the shell.

    `path` is as for `program_words`. The hint is a subcommand of `bc2` where there is no checkout and where the
    program that runs now is one.
    """
    name = subcommand(path)
    if (file := _CHECKOUT / path).is_file() and not sys.argv[0].startswith("bc2 "):
        typed = [interpreter(), here(file)]
    elif (found := shutil.which("bc2")) and os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable):
        typed = ["bc2", name]
    else:
        typed = [interpreter(), "-m", "bc2_jax", name]
    return shlex.join([*typed, *map(str, words)])


def subcommand(path: str) -> str:
    """The subcommand of `bc2` that a program's file is: "reward-report" of "tools/reward_report.py"."""
    return Path(path).stem.replace("_", "-")


def interpreter() -> str:
    """The name or path of this Python as typed in the current directory; not quoted."""
    for name in ("python", "python3"):
        if (found := shutil.which(name)) and os.path.abspath(found) == sys.executable:
            return name
    return here(sys.executable) if sys.executable else "python"
