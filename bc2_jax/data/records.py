"""The reader of text: records of JSON lines, JSON lists, Parquet rows and text files, each with its place.

Unreadable input becomes an `Invalid` in its place, and reading continues behind it where that is possible.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bc2_jax.data.encodings import BYTE_ORDER_MARK, hint, is_utf8, is_wide, transcoded
from bc2_jax.data.streams import Block, Broken, Decompressed, line_blocks
from bc2_jax.data.text_files import kind_of, open_binary

LONGEST = 1 << 30
"""Bytes of the longest line or text file that is read, unless a caller sets less."""
_PIECE_BYTES = 2 << 20
# Damage costs at most one piece of what precedes it.
_DECOMPRESSED_PIECE_BYTES = 64 << 10
_EXCERPT_BYTES = 256
# Undecodable lines of a file by which its encoding is guessed: there may be millions.
_GUESSES = 8
_LOOKED_AT = 1024
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*")


class Record(NamedTuple):
    """The value of a line, an item of a JSON list or a row."""

    value: Any
    where: str
    """File and line or row, from 1."""
    line: int = 0
    byte: int = -1
    """Where the line begins, decompressed; -1 where that has no meaning."""


@dataclasses.dataclass(frozen=True, slots=True)
class Invalid:
    """Takes the place of an unreadable record, so that it is counted and named."""

    reason: str
    where: str
    """File, and line or row, from 1."""
    records: int = 1
    """Records lost; 0 if unknown."""
    detail: str = ""
    line: int = 0
    byte: int = -1
    content: object = b""
    """What stands there, for an excerpt."""

    @property
    def kind(self) -> str:
        """The reason without details, to count by."""
        return self.reason.partition(" (")[0]

    @property
    def at_least(self) -> int:
        """Records lost, counting an unknown number as one."""
        return max(self.records, 1)

    @property
    def message(self) -> str:
        """The reason with its details."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def read_records(path: str, name: str | None = None) -> Iterator[Record | Invalid]:
    """All records of a .jsonl, .ndjson, .json, .txt or .parquet file; all but the last may be .gz or .zst.

    A JSON file holds one object a line, one list whose items are the records, or objects of several lines; a list is
    held in memory whole. A text file is one record with the field "text". `name` stands for the file in `where`, by
    default its path.
    """
    name = name or path
    kind, compression = kind_of(path) or ("jsonl", None)
    try:
        with open_binary(path) as file:
            if kind == "parquet":
                from bc2_jax.data.parquet import read_table  # it imports Record and Invalid

                yield from read_table(file, name)
                return
            if kind == "text":
                text = read_text(file, name, compression)
                yield text if isinstance(text, Invalid) else Record({"text": text}, name)
                return
            raw: Any = Decompressed(file, compression) if compression else file
            stream = io.BufferedReader(raw, _PIECE_BYTES)
            start = stream.peek(_PIECE_BYTES).removeprefix(BYTE_ORDER_MARK.encode()).lstrip()
            several = path.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")
            if start.startswith(b"[") or (several and start.startswith(b"{") and not _is_line(start)):
                yield from _read_values(stream, name)
            else:
                # `read` would discard what precedes damage.
                for block in LineReader(stream.read1, name, compressed=compression is not None):
                    yield from block
    except OSError as error:
        yield Invalid(str(error), name)


def open_text(file: Any, compression: str | None) -> tuple[Callable[[int], bytes], int]:
    """read(n) of the decompressed content, and a good n. Raises OSError at damage, after everything before it."""
    if compression is None:
        return file.read, _PIECE_BYTES
    return Decompressed(file, compression).read, _DECOMPRESSED_PIECE_BYTES


def read_text(
    file: Any, name: str, compression: str | None = None, encoding: str = "utf-8", limit: int = LONGEST,
    limit_name: str = "",
) -> str | Invalid:  # fmt: skip
    """The text of an open file without a byte order mark; Invalid if it is damaged, too long or in another encoding.

    `limit` is in bytes of UTF-8 and `limit_name` names it in messages.
    """
    # At most four bytes of another encoding are one of UTF-8. One byte beyond the limit tells what is too long.
    limit *= 1 if is_utf8(encoding) else 4
    parts, size = [], 0
    try:
        read, piece = open_text(file, compression)
        while size <= limit and (data := read(min(limit + 1 - size, piece))):
            parts.append(data)
            size += len(data)
    except OSError as error:
        reason = "cannot be decompressed" if compression else "cannot be read"
        return Invalid(reason, name, detail=str(error), content=error)
    content = b"".join(parts)
    if size > limit:
        beginning = content[:_LOOKED_AT].decode(encoding, "replace").removeprefix(BYTE_ORDER_MARK)
        reason = f"the text is longer than {limit_name or f'{limit} bytes'}"
        return Invalid(reason, name, byte=0, content=beginning)
    try:
        return content.decode(encoding).removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        reason = f"the file is not {_spelled(encoding)}" + (hint(content) if is_utf8(encoding) else "")
        return undecodable(reason, name, error, byte=error.start)


def undecodable(reason: str, where: str, error: UnicodeDecodeError, **place: Any) -> Invalid:
    """Invalid for bytes that are not text; `place` is its line and byte."""
    content = error.object[max(0, error.start - 16) :][:_EXCERPT_BYTES]
    return Invalid(reason, where, detail=f"{error.reason} at byte {error.start}", content=content, **place)


# ----------------------------------------------------------------------------------------------------------------- JSON


class LineReader:
    """JSON lines of a byte range of a file, as blocks of records; use up each block before you take the next.

    The range has the lines that begin in bytes start .. stop - 1 of the content that `read` gives; with start > 0
    `read` must begin at start - 1. Lines over `limit` bytes are invalid and never held in memory.
    """

    def __init__(
        self, read: Callable[[int], bytes], name: str, *, start: int = 0, stop: int | None = None, first: int = 1,
        piece: int = _PIECE_BYTES, compressed: bool = False, encoding: str = "utf-8", limit: int = LONGEST,
        limit_name: str = "",
    ) -> None:  # fmt: skip
        """`first` numbers the first line; `limit_name` names the limit in messages."""
        if is_wide(encoding):
            read, stop = transcoded(read, encoding), None
        self._read, self._start, self._stop, self._piece = read, start, stop, piece
        self._encoding, self._codec = encoding, "utf-8" if is_wide(encoding) else encoding
        self._name, self._compressed, self._limit = name, compressed, limit
        self._too_long = f"the line is longer than {limit_name or f'{limit} bytes'}"
        self._hint, self._guesses = "", 0
        self.line = first - 1
        """Number of the last line that was read, blank ones included."""

    def __iter__(self) -> Iterator[Iterator[Record | Invalid]]:
        for event in line_blocks(self._read, self._start, self._stop, self._limit, self._piece):
            if isinstance(event, Block):
                yield self._parse_block(event)
            elif isinstance(event, Broken):
                lost = "the rest of the file is lost: it cannot be " + ("decompressed" if self._compressed else "read")
                content = f"{event.reason} at byte {event.position}; the line there: {_printed(event.unfinished)}"
                where, line = f"{self._name}:{self.line + 1}", self.line + 1
                lost_lines = int(bool(event.unfinished))
                yield iter([Invalid(lost, where, lost_lines, event.reason, line, event.position, content)])
                return
            else:
                self.line += 1
                yield iter([self._long(event.start, event.length, event.beginning)])

    def _parse_block(self, block: Block) -> Iterator[Record | Invalid]:
        start = block.start
        for raw in block.data.split(b"\n"):
            self.line += 1
            byte, start = start, start + len(raw) + 1
            if len(raw) > self._limit:
                yield self._long(byte, len(raw), raw[:_EXCERPT_BYTES])
            elif (found := self._parse(raw, f"{self._name}:{self.line}", byte)) is not None:
                yield found

    def _parse(self, raw: bytes, where: str, byte: int) -> Record | Invalid | None:
        text = ""
        try:
            text = raw.decode(self._codec).removeprefix(BYTE_ORDER_MARK)
            return Record(json.loads(text), where, self.line, byte)
        except UnicodeDecodeError as error:
            reason = f"the line is not {_spelled(self._encoding)}" + self._guess(raw)
            return undecodable(reason, where, error, line=self.line, byte=byte)
        except (ValueError, RecursionError) as error:
            if not text.strip():
                return None
            # UTF-16 of ASCII is legal UTF-8.
            reason = "the line is not JSON" + (self._guess(raw) if "\0" in text else "")
            return Invalid(reason, where, 1, str(error), self.line, byte, raw[:_EXCERPT_BYTES])

    def _guess(self, raw: bytes) -> str:
        """What the file's encoding may be."""
        if is_utf8(self._encoding) and not self._hint and self._guesses < _GUESSES:
            self._guesses += 1
            self._hint = hint(raw)
        return self._hint

    def _long(self, byte: int, length: int, beginning: bytes) -> Invalid:
        where, content = f"{self._name}:{self.line}", f"{length} bytes: {_printed(beginning)}"
        return Invalid(self._too_long, where, 1, f"it has {length} bytes", self.line, byte, content)


def _spelled(encoding: str) -> str:
    return "UTF-8" if is_utf8(encoding) else encoding.upper()


def _printed(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _is_line(start: bytes) -> bool:
    """Whether the object with which a file begins ends in its first line, as far as `start` tells.

    A damaged first line must not turn a file of lines into one object, so the next line is looked at too.
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
    """The consecutive values of a file; of a list, its items."""
    content = bytearray()
    damage = ""
    try:
        # `read` would lose what it has when the file turns out to be damaged.
        while block := stream.read1(_PIECE_BYTES):
            content += block
    except OSError as error:
        damage = f"{error}; this and what follows in the file is lost"
    try:
        text = content.removeprefix(BYTE_ORDER_MARK.encode()).decode()
    except UnicodeDecodeError as error:
        shown = hint(bytes(content[error.start :][:_LOOKED_AT]))
        damage = f"it is not UTF-8 ({error.reason}){shown}; this and what follows in the file is lost"
        text = error.object[: error.start].decode()
    del content
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    place = _skip(_SPACE, text, 0)
    items = 0  # of the current list; 0 outside of one
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
            reason = "the list does not continue with a comma or end; what follows in the file is lost"
            yield Invalid(reason, f"{name}:{line + text.count(chr(10), counted, place)}")
            return
    if items or damage:
        yield Invalid(damage or "the list has no end", f"{name}:{line}")


def _skip(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place
