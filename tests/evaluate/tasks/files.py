"""Files in the formats of the benchmarks; every question is made up here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path: Path, rows: Iterable[Sequence[object]], end: str = "\n") -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    return write(path, text.getvalue())


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sums(count: int, start: int = 0) -> list[tuple[str, tuple[str, str, str, str], int]]:
    """(question, options, index of the right one), all different."""
    found = []
    for n in range(start, start + count):
        options = [str(n + 1 + step) for step in (0, 1, 2, 3)]
        found.append((f"{n} 加 {n % 4 + 1} 等于多少？", tuple(options), n % 4))
    return found
