"""Reports of reading: counts, and every unreadable place with its reason."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

# Problems listed of one unit; all are counted.
LISTED = 1000
_EXCERPT_CHARACTERS = 60


class Problem(NamedTuple):
    """A place in the raw files that gave no document, or only part of it."""

    file: str
    line: int
    """From 1; within the unit until `number_lines`. For parquet the row of the file. 0 if it is not about one line."""
    byte: int
    """Where the line begins, decompressed; -1 for parquet."""
    reason: str
    rows: int
    """Rows lost; 0 if none or unknown."""
    excerpt: str
    """First characters, escaped."""


@dataclasses.dataclass
class UnitReport:
    """The report of reading one unit; complete when all of its tables were taken."""

    unit: int
    raw_bytes: int = 0
    """Bytes of the raw files, as stored."""
    text_bytes: int = 0
    """UTF-8 bytes of the texts, before normalisation."""
    normal_bytes: int = 0
    """UTF-8 bytes of the texts passed on, after normalisation."""
    documents: int = 0
    """Passed on."""
    lines: int = 0
    """Lines of a JSON-lines unit, blank ones included."""
    normalized: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Documents changed by each rule of normalisation."""
    languages: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Documents passed on by language."""
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Problems by reason."""
    lost: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Rows lost by reason, as far as known."""
    problems: list[Problem] = dataclasses.field(default_factory=list)
    """The first LISTED."""

    def add(
        self, file: str, reason: str, *, line: int = 0, byte: int = -1, rows: int = 1, content: object = ""
    ) -> None:
        self.reasons[reason] += 1
        self.lost[reason] += rows
        if len(self.problems) < LISTED:
            self.problems.append(Problem(file, line, byte, reason, rows, excerpt(content)))

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        counters = ("normalized", "languages", "reasons", "lost")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {name: dict(values[name]) for name in counters} | {"problems": [list(p) for p in self.problems]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> UnitReport:
        """From what `to_json` gave; other fields are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        report = cls(**{name: value for name, value in values.items() if name in names})
        report.problems = [Problem(*problem) for problem in report.problems]
        return report


def excerpt(content: object) -> str:
    """The beginning of text or bytes with unprintable characters escaped, safe for a terminal."""
    if isinstance(content, (bytes, bytearray, memoryview)):
        text = bytes(content[: 4 * _EXCERPT_CHARACTERS]).decode("utf-8", "backslashreplace")
    else:
        text = str(content)
    cut = text[:_EXCERPT_CHARACTERS]
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return safe + ("..." if len(text) > len(cut) else "")


def number_lines(reports: Iterable[tuple[UnitReport, str, int]]) -> list[UnitReport]:
    """Makes line numbers absolute.

    `reports` are (report, file, first byte of the unit's range) of all units in order; a unit at byte 0 begins a file.
    """
    result = []
    before = 0
    previous = None
    for report, file, start in reports:
        if start == 0 or file != previous:
            before, previous = 0, file
        numbered = [p._replace(line=p.line + before) if p.line and p.byte >= 0 else p for p in report.problems]
        result.append(dataclasses.replace(report, problems=numbered))
        before += report.lines
    return result


def problems_table(reports: Iterable[UnitReport]) -> pa.Table:
    """Columns unit, file, line, byte, reason, rows, excerpt."""
    import pyarrow as pa

    found = [(report.unit, *problem) for report in reports for problem in report.problems]
    columns = list(zip(*found, strict=True)) if found else [()] * 7
    types = (pa.int64(), pa.string(), pa.int64(), pa.int64(), pa.string(), pa.int64(), pa.string())
    names = ("unit", *Problem._fields)
    return pa.table({name: pa.array(column, kind) for name, column, kind in zip(names, columns, types, strict=True)})
