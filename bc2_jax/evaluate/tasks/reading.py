"""Finds and reads the released files of benchmarks; errors name what is missing or damaged."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from bc2_jax.data.records import Invalid, read_records
from bc2_jax.data.streams import Decompressed
from bc2_jax.validation import show

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LISTED = 12
RECORDS = (".jsonl", ".json", ".ndjson", ".parquet")


class Row(NamedTuple):
    """A row of a table, or a record."""

    values: Mapping[str, Any]
    where: str  # file and line, row or item, from 1

    def text(self, field: str) -> str:
        """A text field. Raises ValueError, naming file and line, if it is missing or something else."""
        value = self.values.get(field)
        if isinstance(value, str):
            return value
        found = f"is {show(value)}" if field in self.values else f"is missing among {', '.join(self.values)}"
        raise ValueError(f"{self.where}: {field!r} {found}; it must be text.")

    def filled(self, field: str) -> str:
        """A text field that is not empty."""
        value = self.text(field)
        if not value.strip():
            raise ValueError(f"{self.where}: {field!r} is empty.")
        return value

    def letter(self, field: str, letters: str) -> int:
        """The index in `letters` of the field's letter, ignoring case and white space."""
        found = self.answers(field, letters)
        if len(found) != 1:
            self._refuse_letters(field, letters)
        return found[0]

    def answers(self, field: str, letters: str) -> list[int]:
        """The indices of the right letters, from "A", "AC" or ["A", "C"]; [] if none are given."""
        value = self.values.get(field)
        parts = [] if value is None else value if isinstance(value, list) else [value]
        texts = ["".join(part.split()).upper() if isinstance(part, str) else "?" for part in parts]
        found = [letters.find(letter) for text in texts for letter in text]
        if -1 in found:
            self._refuse_letters(field, letters)
        return sorted(set(found))

    def _refuse_letters(self, field: str, letters: str) -> NoReturn:
        legal = f"it must be one of {', '.join(letters)}"
        raise ValueError(f"{self.where}: {field!r} is {show(self.values.get(field))}; {legal}.")

    def options(self, field: str) -> tuple[str, ...]:
        """The options of an object {"A": text, ...} or a list [{"key": "A", "value": text}, ...], by letter."""
        value = self.values.get(field)
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            value = {one.get("key"): one.get("value") for one in value}
        if not isinstance(value, dict) or "".join(sorted(map(str, value))) != "ABCDEFGH"[: len(value)]:
            raise ValueError(f"{self.where}: {field!r} is {show(value)}; it must be an object with A, B, C, D, ...")
        wrong = [one for one in value.values() if not isinstance(one, str)]
        if wrong:
            raise ValueError(f"{self.where}: {field!r} has the option {show(wrong[0])}, which is not text.")
        return tuple(value[letter] for letter in sorted(value))


# --------------------------------------------------------------------------------------------------------------- places


def find_folder(
    data_dir: Path, names: Sequence[str], inner: Sequence[str], holds: Callable[[Path], bool], source: str
) -> Path:
    """The first folder for which `holds` is true: DATA_DIR/NAME/INNER or DATA_DIR/INNER (INNER may be "").

    Names are compared ignoring case, hyphens and underscores. Raises FileNotFoundError, with `source` (what is
    expected), if there is none.
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
    """The first names in a folder."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shown = ", ".join(names[:_LISTED]) or "nothing"
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def require_file(path: Path, what: str) -> Path:
    """`path` if it exists. Raises FileNotFoundError with `what` it is, and a similar name if there is one."""
    if path.is_file():
        return path
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    there = [name for name in names if not name.startswith(".")]
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    like = f" {close[0]} is there: rename it if it is this file." if close else ""
    raise FileNotFoundError(f"{path} is missing: {what}.{like}")


def missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """A note that names missing files, without which the result is not the benchmark's figure."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return []
    found = f"{len(names) - len(missing)} of {len(names)} files are in {folder}"
    return [f"Only {found} ({listing(folder)}), so this is not the benchmark's figure; missing: {', '.join(missing)}."]


def files_by_name(folder: Path, pattern: str, known: Collection[str], what: str) -> dict[str, Path]:
    """Name -> file, of the files in `folder` that match `pattern` ("*_val.csv", * is the name), sorted.

    Hidden files are ignored. Raises ValueError for another file with this suffix and for a name not in `known` (unless
    that is empty), since its items would be silently missing.
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
    path: Path, columns: Sequence[str] | None = None, needed: Sequence[str] = (), broken: list[str] | None = None
) -> Iterator[Row]:
    """The rows of a .csv file or the objects of a .jsonl, .json or .parquet file, each with the fields `needed`.

    `columns`: for a .csv file without a header. `broken`: gets a message for each line that is not JSON, for files
    released with such lines. Raises ValueError for the first unusable row, and for a file without rows.
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
    # CRLF becomes LF inside quoted cells too.
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


# -------------------------------------------------------------------------------------------------------- text files

SHOTS_FILE = "shots.txt"  # worked examples of a paper, verbatim, beside a benchmark's own files


def find_file(data_dir: Path, names: Sequence[str], inner: Sequence[str], files: Sequence[str], source: str) -> Path:
    """The first of `files`, plain or with .gz, in the folder of a benchmark; see `find_folder`."""
    both = [name for file in files for name in (file, f"{file}.gz")]
    folder = find_folder(data_dir, names, inner, lambda place: any((place / name).is_file() for name in both), source)
    return next(folder / name for name in both if (folder / name).is_file())


def read_text(path: Path) -> str:
    """The text of a file, decompressed if .gz, without a byte order mark and with LF line ends.

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
    """The lines of a file. Raises ValueError for an empty line or file."""
    lines = read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{path}:{number} is empty: each line must be a sentence.")
    return lines


def split_shots(text: str, opening: str) -> tuple[str, list[str]]:
    """(text before the worked examples, the examples), each starting at a line that begins with `opening`; stripped."""
    first, *shots = re.split(rf"^(?={re.escape(opening)})", text, flags=re.MULTILINE)
    return first.strip(), [shot.rstrip() for shot in shots]


def read_shots(path: Path, opening: str, answer: str, count: int) -> tuple[str, list[str]]:
    """`split_shots` of a file, the first `count` examples.

    Raises ValueError for fewer, and for an example without a line that begins with `answer`.
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
