"""The released files of benchmarks: where they lie, and their rows; what is missing or damaged is named."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.data.records import Invalid, read_records
from bc2_jax.validation import show

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LISTED = 12
RECORDS = (".jsonl", ".json", ".ndjson", ".parquet")


class Row(NamedTuple):
    """A row of a table, or a record."""

    values: Mapping[str, Any]
    where: str
    """File and line, row or item, from 1."""

    def text(self, field: str) -> str:
        """A field that must be text. Raises ValueError, naming the place, if it is missing or something else."""
        value = self.values.get(field)
        if isinstance(value, str):
            return value
        found = f"is {show(value)}" if field in self.values else f"is missing among {', '.join(self.values)}"
        raise ValueError(f"{self.where}: {field!r} {found}; it must be text.")

    def filled(self, field: str) -> str:
        """A text that must not be empty."""
        value = self.text(field)
        if not value.strip():
            raise ValueError(f"{self.where}: {field!r} is empty.")
        return value

    def letter(self, field: str, letters: str) -> int:
        """Which of `letters` a field holds, as an index; blanks and lower case are forgiven."""
        found = self.answers(field, letters)
        if len(found) != 1:
            raise ValueError(f"{self.where}: {field!r} is {show(self.values.get(field))}; {_legal(letters)}.")
        return found[0]

    def answers(self, field: str, letters: str) -> list[int]:
        """The indices of the letters that are right, from "A", "AC" or ["A", "C"]; [] if none are given."""
        value = self.values.get(field)
        parts = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{self.where}: {field!r} is {show(value)}; {_legal(letters)}.")
        found = [letters.find(letter) for part in parts for letter in "".join(part.split()).upper()]
        if -1 in found:
            raise ValueError(f"{self.where}: {field!r} is {show(value)}; {_legal(letters)}.")
        return sorted(set(found))

    def options(self, field: str) -> tuple[str, ...]:
        """The options of an object {"A": text, ...} or a list [{"key": "A", "value": text}, ...], in their order."""
        value = self.values.get(field)
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            value = {one.get("key"): one.get("value") for one in value}
        if not isinstance(value, dict) or "".join(sorted(map(str, value))) != "ABCDEFGH"[: len(value)]:
            raise ValueError(f"{self.where}: {field!r} is {show(value)}; it must be an object with A, B, C, D, ...")
        wrong = [one for one in value.values() if not isinstance(one, str)]
        if wrong:
            raise ValueError(f"{self.where}: {field!r} has the option {show(wrong[0])}, which is not text.")
        return tuple(value[letter] for letter in sorted(value))


def _legal(letters: str) -> str:
    return f"it must be one of {', '.join(letters)}"


# --------------------------------------------------------------------------------------------------------------- places


def find_folder(
    data_dir: Path, names: Sequence[str], inner: Sequence[str], holds: Callable[[Path], bool], source: str
) -> Path:
    """The folder with a benchmark's files: one of `inner` ("" for itself) of DATA_DIR/NAME, or of DATA_DIR itself.

    `names` are compared without regard to case, hyphens and underscores. Raises FileNotFoundError, with `source` (what
    is expected), if `holds` is true of none.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir} is not a folder; the benchmarks' files are expected there: {source}")
    folders = sorted(path for path in data_dir.iterdir() if path.is_dir())
    named = [folder for folder in folders if _plain(folder.name) in {_plain(name) for name in names}]
    for base in [*named, data_dir]:
        for part in inner:
            if (base / part).is_dir() and holds(base / part):
                return base / part
    looked = named[0] if named else data_dir
    raise FileNotFoundError(f"{looked} does not hold the expected files ({listing(looked)} is there): {source}")


def listing(folder: Path) -> str:
    """The names in a folder, the first ones if there are many."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shown = ", ".join(names[:_LISTED]) or "nothing"
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def require_file(path: Path, what: str) -> Path:
    """`path`, or FileNotFoundError that says what it is, and which name there is like it."""
    if path.is_file():
        return path
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    there = [name for name in names if not name.startswith(".")]
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    like = f" {close[0]} is there: rename it if it is this file." if close else ""
    raise FileNotFoundError(f"{path} is missing: {what}.{like}")


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """A note that names those which are not there: what is computed is not the benchmark's figure then."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return []
    found = f"{len(names) - len(missing)} of {len(names)} files are in {folder}"
    return [f"Only {found} ({listing(folder)}), so this is not the benchmark's figure; missing: {', '.join(missing)}."]


def files_by_name(folder: Path, pattern: str, known: Collection[str], what: str) -> dict[str, Path]:
    """Name -> file, of those in `folder` that are called like `pattern` ("*_val.csv", * is the name), sorted.

    Another file with the same suffix is a renamed or foreign one, and so is a name that is not in `known`, unless that
    is empty: ValueError, since its items would be missing in silence. Hidden files are none.
    """
    before, _, after = pattern.partition("*")
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or path.suffix != Path(pattern).suffix or not path.is_file():
            continue
        name = path.name.removeprefix(before).removesuffix(after)
        fits = path.name.startswith(before) and path.name.endswith(after) and name
        if not fits or (known and name not in known):
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {pattern.replace('*', close[0])}?" if close else ""
            raise ValueError(f"{path} is not called {pattern} with * {what}{meant or '.'}")
        found[name] = path
    return found


# ----------------------------------------------------------------------------------------------------------------- rows


def read_rows(
    path: Path,
    columns: Sequence[str] | None = None,
    needed: Sequence[str] = (),
    broken: list[str] | None = None,
) -> Iterator[Row]:
    """The rows of a .csv file, or the objects of .jsonl, .json and .parquet.

    `columns` names those of a .csv file without a header. Each row has the fields `needed`. Raises ValueError for the
    first row that can't be used, and for a file without any. `broken` is for files that were released with lines which
    are not JSON: these are left out, and named there.
    """
    rows = _read_csv(path, columns, needed) if path.suffix == ".csv" else _read_objects(path, needed, broken)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} holds no rows.")
    yield first
    yield from rows


def _read_objects(path: Path, needed: Sequence[str], broken: list[str] | None) -> Iterator[Row]:
    for record in read_records(str(path)):
        if isinstance(record, Invalid):
            if broken is not None and record.kind == "the line is not JSON" and path.suffix == ".jsonl":
                broken.append(str(record))
                continue
            raise ValueError(f"{record}.")
        if not isinstance(record.value, dict):
            raise ValueError(f"{record.where}: it is {show(record.value)}, not an object with {', '.join(needed)}.")
        row = Row(record.value, record.where)
        _require_fields(row.where, row.values, needed)
        yield row


def _read_csv(path: Path, columns: Sequence[str] | None, needed: Sequence[str]) -> Iterator[Row]:
    content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: it is not UTF-8 ({error.reason}): save the file as UTF-8.") from error
    # A file that went through Windows has the same texts as before, in quoted cells of several lines too.
    reader = csv.reader(io.StringIO(text.replace("\r\n", "\n"), newline=""))
    first = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{first}: it is not CSV ({error}).") from error
        if cells is None:
            break
        where, first = f"{path}:{first}", reader.line_num + 1
        if not cells or cells == [""]:
            continue
        if columns is None:
            columns = [name.strip() for name in cells]
            _require_fields(where, columns, needed, "the header ")
        elif len(cells) != len(columns):
            names = ", ".join(name or "(number)" for name in columns)
            raise ValueError(f"{where}: it has {len(cells)} columns instead of {len(columns)} ({names}).")
        else:
            yield Row(dict(zip(columns, cells, strict=True)), where)


def _require_fields(where: str, there: Collection[str], needed: Sequence[str], what: str = "") -> None:
    for name in needed:
        if name not in there:
            found = ", ".join(other or "(none)" for other in there)
            raise ValueError(f"{where}: {what}lacks {name!r}; it has {found}.")
