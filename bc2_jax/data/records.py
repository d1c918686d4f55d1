"""Records of JSON and Parquet files, each with its place. What can't be read is named; reading goes on behind it."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NamedTuple

from bc2_jax.data.decompression import Decompressed
from bc2_jax.data.encodings import hint
from bc2_jax.data.text_files import kind_of, open_binary

LONGEST_LINE = 1 << 30
"""Bytes of a line; a longer one is invalid and never held in memory."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 1 << 20
_ROWS_AT_A_TIME = 64
_LOOKED_AT = 1024
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")


class Record(NamedTuple):
    """What a line, an item of a JSON list or a row holds."""

    value: Any
    where: str
    """File and line or row, from 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Invalid:
    """Takes the place of a record that can't be used, so that it is counted and named."""

    reason: str
    where: str
    """File, and line or row, from 1."""
    records: int = 1
    """How many are lost, as far as it is known."""

    @property
    def kind(self) -> str:
        """The reason without its details, to count by."""
        return self.reason.partition(" (")[0]

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def read_records(path: str, name: str | None = None) -> Iterator[Record | Invalid]:
    """The records of a .jsonl, .ndjson, .json or .parquet file; those of JSON may be .gz or .zst too.

    A JSON file holds an object a line, or one list, whose items are the records, or objects of several lines. Such a
    list is held in memory as a whole. `name` is what the file is called in `where`, by default its path.
    """
    name = name or path
    kind, compression = kind_of(path) or ("jsonl", None)
    if kind == "parquet":
        yield from _read_table(path, name)
        return
    try:
        with open_binary(path) as file:
            raw: Any = Decompressed(file, compression) if compression else file
            stream = io.BufferedReader(raw, _BLOCK)
            start = stream.peek(_BLOCK).removeprefix(_BYTE_ORDER_MARK).lstrip()
            several = path.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")
            if start.startswith(b"[") or (several and start.startswith(b"{") and not _is_line(start)):
                yield from _read_values(stream, name)
            else:
                yield from read_lines(stream, name)
    except OSError as error:
        yield Invalid(str(error), name)


# ----------------------------------------------------------------------------------------------------------------- JSON


def read_lines(lines: BinaryIO, name: str, first: int = 1, size: int | None = None) -> Iterator[Record | Invalid]:
    """The JSON value of each line that is not empty, up to the line in which byte `size` is, by default all.

    `first` is the number of the first line. Damage of the file ends it, after what comes before was given.
    """
    number = first
    position = 0
    while True:
        where = f"{name}:{number}"
        try:
            line, length = _read_line(lines)
        except OSError as error:
            yield Invalid(f"{error}; this and what follows in the file is lost", where)
            return
        if not length:
            return
        if line is None:
            yield Invalid(f"the line has {length} bytes, more than {LONGEST_LINE}", where)
        elif not line.isspace():
            found: Any = decode(line, where)
            del line  # it may be large: two copies exist while JSON is read, one after that
            if isinstance(found, str):
                found = _parse(found, where)
            yield found
            del found
        number += 1
        position += length
        if size is not None and position >= size:
            return


def decode(content: bytes, where: str) -> str | Invalid:
    """UTF-8, with or without a byte order mark."""
    try:
        return content.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        return Invalid(f"it is not UTF-8 ({error.reason} at byte {error.start}){hint(content)}", where)


def _read_line(lines: BinaryIO) -> tuple[bytes | None, int]:
    """A line and its size; None in place of one that is too long; size 0 at the end."""
    line = lines.readline(LONGEST_LINE + 1)
    size = len(line)
    if size <= LONGEST_LINE:
        return line, size
    while not line.endswith(b"\n") and (line := lines.readline(_BLOCK)):
        size += len(line)
    return None, size


def _parse(text: str, where: str) -> Record | Invalid:
    try:
        return Record(json.loads(text), where)
    except (ValueError, RecursionError) as error:
        return Invalid(f"it is not JSON ({error})", where)


def _is_line(start: bytes) -> bool:
    """Whether the object with which a file begins ends in its first line, as far as `start` tells.

    A first line that is damaged must not make one object of a file of lines: the next one is then looked at.
    """
    line, newline, rest = start.partition(b"\n")
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:
        return not newline or (bool(line.strip(b"{ \t\r")) and rest.lstrip().startswith(b"{"))
    return True


def _read_values(stream: io.BufferedReader, name: str) -> Iterator[Record | Invalid]:
    """The values of a file that follow one another; of a list, its items."""
    content = bytearray()
    damage = ""
    try:
        # `read` would lose what it has when the file turns out to be damaged.
        while block := stream.read1(_BLOCK):
            content += block
    except OSError as error:
        damage = f"{error}; this and what follows in the file is lost"
    try:
        text = content.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        shown = hint(bytes(content[error.start :][:_LOOKED_AT]))
        damage = f"it is not UTF-8 ({error.reason}){shown}; this and what follows in the file is lost"
        text = error.object[: error.start].decode()
    del content
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    place = _skip(_SPACE, text, 0)
    items = 0  # of the list that is being read; 0 outside of one
    while place < len(text):
        if not items and text[place] == "[":
            items, place = 1, _skip(_SPACE, text, place + 1)
            if text[place : place + 1] == "]":
                items, place = 0, _skip(_SPACE, text, place + 1)
            continue
        line, counted = line + text.count("\n", counted, place), place
        where = f"{name}:{line} (item {items})" if items else f"{name}:{line}"
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield Invalid(damage or f"it is not JSON ({error}); this and what follows in the file is lost", where)
            return
        yield Record(value, where)
        del value
        place = _skip(_SPACE, text, end)
        if items and (comma := _COMMA.match(text, place)):
            items, place = items + 1, comma.end()
        elif items and text[place : place + 1] == "]":
            items, place = 0, _skip(_SPACE, text, place + 1)
        elif items and place < len(text):
            reason = "the list does not go on with a comma or end; what follows in the file is lost"
            yield Invalid(reason, f"{name}:{line + text.count(chr(10), counted, place)}")
            return
    if items or damage:
        yield Invalid(damage or "the list has no end", f"{name}:{line}")


def _skip(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


# -------------------------------------------------------------------------------------------------------------- Parquet


def _read_table(path: str, name: str) -> Iterator[Record | Invalid]:
    parquet, pyarrow = import_arrow("pyarrow.parquet"), import_arrow("pyarrow")
    try:
        with parquet.ParquetFile(open_binary(path)) as opened:
            rows = [opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        yield Invalid(f"it is not a complete Parquet file ({first_line(error)})", name)
        return
    first = 1
    for group, count in enumerate(rows):
        yield from read_row_group(path, name, group, first)
        first += count


def read_row_group(
    path: str, name: str, group: int, first: int, only: Collection[str] | None = None
) -> Iterator[Record | Invalid]:
    """The rows of a row group of a Parquet file as objects of its columns, or of those that `only` names.

    `first` is the number of the group's first row in the file, which `name` stands for in `where`.
    """
    parquet, pyarrow = import_arrow("pyarrow.parquet"), import_arrow("pyarrow")
    with parquet.ParquetFile(open_binary(path), page_checksum_verification=True) as opened:
        rows = opened.metadata.row_group(group).num_rows
        columns = [column for column in opened.schema_arrow.names if only is None or column in only]
        done = 0
        try:
            for batch in opened.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=columns):
                values = [_values(column, pyarrow) for column in batch.columns]
                for record in zip(*values, strict=True):
                    done += 1
                    where = f"{name}:{first + done - 1}"
                    bad = next((value for value in record if isinstance(value, Invalid)), None)
                    if bad is not None:
                        yield Invalid(f"{bad.where}: {bad.reason}", where)
                    else:
                        yield Record(dict(zip(columns, record, strict=True)), where)
        except (pyarrow.ArrowException, OSError) as error:
            reason = f"rows {first + done}-{first + rows - 1} can't be read ({first_line(error)})"
            yield Invalid(reason, name, rows - done)


def _values(column: Any, pyarrow: Any) -> list[Any]:
    """The values of a column; Parquet promises UTF-8, but nobody checks it."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_nested(column.type):
            return [_value(column, row) for row in range(len(column))]
        content = column.cast(pyarrow.binary()).to_pylist()
        return [None if value is None else decode(value, "in text") for value in content]


def _value(column: Any, row: int) -> Any:
    try:
        return column[row].as_py()
    except UnicodeDecodeError as error:
        return Invalid(f"it is not UTF-8 ({error.reason})", "in text")


def first_line(error: Exception) -> str:
    """Of a message, without its full stop."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def import_arrow(module: str) -> Any:
    """pyarrow or a module of it. Raises ValueError, naming the extra, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ValueError(f".parquet files need {name}: pip install 'bc2_jax[data]'.") from error
