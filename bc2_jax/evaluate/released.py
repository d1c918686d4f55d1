"""The files of benchmarks as they were released: found by name below a folder, read whole, refused if damaged."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.data.decompression import Decompressed
from bc2_jax.data.records import Invalid, read_records
from bc2_jax.validation import choices, join_some, show

_KINDS: dict[type, str] = {str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


class Row(NamedTuple):
    """An object of a file."""

    value: dict[str, Any]
    where: str
    """File, and line or item, from 1."""


def folders(data_dir: Path, *names: str) -> list[Path]:
    """Where the files of a benchmark may lie: in data_dir/NAME for each of `names`, or in data_dir itself."""
    return [folder for folder in (*(data_dir / name for name in names), data_dir) if folder.is_dir()]


def find(data_dir: Path, names: Sequence[str], places: Sequence[str], source: str) -> Path:
    """The first file called one of `names` (relative paths; .gz may follow) in one of `places` or in `data_dir`.

    Raises FileNotFoundError with `source`, what to download, and what lies there instead.
    """
    for folder in folders(data_dir, *places):
        for name in names:
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
    where = " or ".join(str(folder) for folder in (*(data_dir / place for place in places), data_dir))
    raise FileNotFoundError(f"There is no {choices(names)} in {where}{_instead(data_dir, names, places)}: {source}")


def _instead(data_dir: Path, names: Sequence[str], places: Sequence[str]) -> str:
    """The files there whose names are the most alike."""
    there = {
        str(path.relative_to(folder)): None
        for folder in folders(data_dir, *places)
        for parent in {folder / Path(name).parent for name in names}
        if parent.is_dir()
        for path in sorted(parent.iterdir())
        if path.is_file()
    }
    near = difflib.get_close_matches(names[0], there, n=5, cutoff=0.4) or list(there)
    return f" (there is {join_some(near, 5)})" if there else ""


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if its name ends in .gz. Raises ValueError if it is damaged."""
    try:
        with path.open("rb") as file:
            return Decompressed(file, "gzip").readall() if path.suffix == ".gz" else file.read()
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}.") from error


def read_text(path: Path) -> str:
    """The text of a file, its line ends as they are, without a byte order mark."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def read_rows(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[Row]:
    """The objects of a .json, .jsonl (.gz) or .parquet file, each of which has `fields` with values of these types.

    Raises ValueError for a line that can't be read, a field that is missing or of another type, and an empty file.
    """
    rows = [_check(row, fields) for row in _objects(path)]
    if not rows:
        raise ValueError(f"{path} is empty: it must hold objects with {choices(fields)}.")
    return rows


def _objects(path: Path) -> Iterator[Row]:
    for record in read_records(str(path)):
        if isinstance(record, Invalid):
            raise ValueError(f"{record}.")
        examples = record.value.get("examples") if isinstance(record.value, dict) else None
        if isinstance(examples, list):  # one object around the list, with a canary or the licence beside it
            yield from (Row(value, f"{record.where} (example {n})") for n, value in enumerate(examples, 1))
        else:
            yield Row(record.value, record.where)


def _check(row: Row, fields: dict[str, type | tuple[type, ...]]) -> Row:
    if not isinstance(row.value, dict):
        raise ValueError(f"{row.where} is {show(row.value)}: it must be an object with {choices(fields)}.")
    for name, kinds in fields.items():
        if name not in row.value:
            raise ValueError(f"{row.where} has no field {name!r}: it must have {choices(fields)}.")
        if not isinstance(row.value[name], kinds):
            wanted = " or ".join(_KINDS[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise ValueError(f"{row.where}: {name} = {show(row.value[name])} is not valid: it must be {wanted}.")
    return row


def unique_ids(rows: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError if two of the (id, where) have one id."""
    seen: dict[str, str] = {}
    for name, where in rows:
        if name in seen:
            raise ValueError(f"{where}: the id {name!r} is that of {seen[name]} too.")
        seen[name] = where
