"""Benchmarks that are one file, and their files of text: sentences, and prompts with worked examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.data.streams import Decompressed
from bc2_jax.evaluate.tasks.reading import find_folder

SHOTS_FILE = "shots.txt"
"""Beside a benchmark's own files: the worked examples of a paper, verbatim."""


def find_file(
    data_dir: Path, names: Sequence[str], inner: Sequence[str], files: Sequence[str], source: str
) -> Path:  # fmt: skip
    """The first of `files`, plain or with .gz, in the folder of a benchmark; see `find_folder`."""
    both = [name for file in files for name in (file, f"{file}.gz")]
    folder = find_folder(data_dir, names, inner, lambda place: any((place / name).is_file() for name in both), source)
    return next(folder / name for name in both if (folder / name).is_file())


def read_text(path: Path) -> str:
    """The text of a file, or of a .gz file, without a byte order mark and with plain line ends.

    Raises ValueError if it is damaged or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = Decompressed(file, "gzip").readall() if path.suffix == ".gz" else file.read()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error
    assert content is not None
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a file. Raises ValueError for an empty one, and for a file without any."""
    lines = read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{path}:{number} is empty: each line must be a sentence.")
    return lines


def split_shots(text: str, opening: str) -> tuple[str, list[str]]:
    """What comes before the first worked example, and the examples: each begins with a line that begins with `opening`.

    Blanks at their ends are left out.
    """
    first, *shots = re.split(rf"^(?={re.escape(opening)})", text, flags=re.MULTILINE)
    return first.strip(), [shot.rstrip() for shot in shots]


def read_shots(path: Path, opening: str, answer: str, count: int) -> tuple[str, list[str]]:
    """`split_shots` of a file that must have at least `count` examples, each with a line that begins with `answer`.

    Raises ValueError, naming the file, otherwise. The first `count` are given.
    """
    before, shots = split_shots(read_text(path), opening)
    if len(shots) < count:
        raise ValueError(
            f"{path} has {len(shots)} worked examples instead of {count}: each begins with a line {opening!r}."
        )
    for number, shot in enumerate(shots[:count], 1):
        if not re.search(rf"^{re.escape(answer)}\s*\S", shot, re.MULTILINE):
            raise ValueError(f"{path}: worked example {number} has no answer after a line {answer!r}.")
    return before, shots[:count]
