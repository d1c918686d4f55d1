"""Documents of text files (`text_files`, `records`): texts with source, language, quality score and sampling weight.

A record may have a `source` (default: the name of the file's folder), a `language` (default: "unknown"), a `score` for
quality in 0..1 (default: 1) and a sampling `weight` (default: 1). Files are read in spans, so that processes can share
the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from bc2_jax.data.parquet import open_parquet, read_row_group, why_no_texts
from bc2_jax.data.records import LONGEST, Invalid, LineReader, Record, open_text, read_text
from bc2_jax.data.text_files import LEGAL, Kind, kind_of, open_binary
from bc2_jax.validation import require

_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text and what is known about it."""

    text: str
    source: str
    language: str
    score: float
    """Quality, 0..1."""
    weight: float
    """Relative number of times to sample it, positive."""
    where: str
    """File and line or row."""


@dataclasses.dataclass(frozen=True)
class InvalidDocument:
    """Takes the place of an unreadable document, so that it is counted and logged."""

    reason: str
    """With file and line or row."""
    documents: int = 1
    """Documents lost, at least."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields or columns of a record."""

    text: str = "text"
    source: str = "source"


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of a file that is read by itself."""

    file: str
    start: int
    """First byte; in a .parquet, the row group."""
    stop: int
    first: int
    """Number of its first line or row, from 1."""
    size: int
    """Bytes, uncompressed if that is known."""


@dataclasses.dataclass(frozen=True)
class ScannedFile:
    """A file, the hash of its content, and its spans; an unreadable file has a `problem` and no spans."""

    path: str
    size: int
    sha256: str
    spans: tuple[Span, ...]
    problem: str | None = None


def scan_file(path: str | os.PathLike[str], fields: Fields, span_bytes: int) -> ScannedFile:
    """Hashes a file and cuts it into spans: .jsonl into about `span_bytes`, .parquet into row groups, others not."""
    name = os.fspath(path)
    digest = hashlib.sha256()
    size, line, spans = 0, 1, []
    start, first = 0, 1
    kind, compression = _kind(name)
    cut_lines = kind == "jsonl" and compression is None
    try:
        with open_binary(name) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                if cut_lines and size + len(block) - start >= span_bytes and (end := block.rfind(b"\n") + 1):
                    line += block.count(b"\n", 0, end)
                    spans.append(Span(name, start, size + end, first, size + end - start))
                    start, first = size + end, line
                    line += block.count(b"\n", end)
                elif cut_lines:
                    line += block.count(b"\n")
                size += len(block)
    except OSError as error:
        return ScannedFile(name, size, digest.hexdigest(), (), f"{name}: cannot be read ({error})")
    if size > start or not cut_lines:
        spans.append(Span(name, start, size, first, size - start))
    problem = None
    if kind == "parquet":
        spans, problem = _row_groups(name, fields)
    return ScannedFile(name, size, digest.hexdigest(), tuple(spans), problem)


def _row_groups(name: str, fields: Fields) -> tuple[list[Span], str | None]:
    with open_binary(name) as file:
        parquet = open_parquet(file, name)
        if isinstance(parquet, Invalid):
            return [], str(parquet)
        if reason := why_no_texts(parquet.schema_arrow, fields.text):
            return [], f"{name}: {reason}; its columns are {', '.join(parquet.schema_arrow.names)}"
        spans, row = [], 1
        for index in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(index)
            spans.append(Span(name, index, index + 1, row, group.total_byte_size))
            row += group.num_rows
        return spans, None


def read_span(span: Span, fields: Fields) -> Iterator[Document | InvalidDocument]:
    """The documents of one span in order."""
    if _kind(span.file)[0] == "text":
        fields = Fields()
    for record in _read_records(span, fields):
        if isinstance(record, Invalid):
            yield InvalidDocument(str(record), record.at_least)
        else:
            yield _document(record.value, fields, span.file, record.where)
        del record


def _read_records(span: Span, fields: Fields) -> Iterator[Record | Invalid]:
    name = span.file
    kind, compression = _kind(name)
    with open_binary(name) as file:
        batches: Iterable[Iterable[Record | Invalid]]
        if kind == "text":
            text = read_text(file, name, compression)
            batches = [[text if isinstance(text, Invalid) else Record({fields.text: text}, name)]]
        elif kind == "parquet":
            columns = (fields.text, fields.source, "language", "score", "weight")
            parquet = open_parquet(file, name)
            if isinstance(parquet, Invalid):
                batches = [[parquet]]
            else:
                batches = read_row_group(parquet, file, span.start, span.first, name, columns=columns)
        else:
            file.seek(max(0, span.start - 1))
            read, piece = open_text(file, compression)
            batches = LineReader(
                read, name, start=span.start, stop=None if compression else span.stop, first=span.first,
                piece=piece if compression else min(piece, span.size), compressed=compression is not None,
                limit=LONGEST,
            )  # fmt: skip
        yield from chain.from_iterable(batches)


def _kind(path: str) -> tuple[Kind, str | None]:
    kind = kind_of(path)
    require(kind is not None, "INPUT", path, f"files must be {LEGAL}")
    assert kind is not None
    return kind


def why_no_text(record: object, field: str) -> str | None:
    """Why a record has no legal text in `field`, details in parentheses; None if it has one."""
    if not isinstance(record, dict):
        return "the row is not an object"
    if field not in record:
        return f"the row has no field {field!r}"
    value = record[field]
    if not isinstance(value, str):
        kinds = {dict: "an object", list: "a list", bool: "a truth value", bytes: "bytes", type(None): "null"}
        return f"field {field!r} is {kinds.get(type(value), 'a number')}, not a string"
    try:
        # In pieces: a whole copy of a long text costs memory.
        for start in range(0, 0 if value.isascii() else len(value), _BLOCK):
            value[start : start + _BLOCK].encode()
    except UnicodeEncodeError as error:
        return f"field {field!r} has half of a surrogate pair (at character {start + error.start})"
    return None


def _document(record: Any, fields: Fields, file: str, where: str) -> Document | InvalidDocument:
    if reason := why_no_text(record, fields.text):
        return InvalidDocument(f"{where}: {reason}")
    source = record.get(fields.source)
    if source is None or source == "":
        source = Path(file).resolve().parent.name
    language = record.get("language") or "unknown"
    for field, value in ((fields.source, source), ("language", language)):
        if reason := why_no_text({field: value}, field):
            return InvalidDocument(f"{where}: {reason}")
    numbers = []
    for field, legal in (("score", "in 0..1"), ("weight", "positive")):
        value = record.get(field)
        value = 1.0 if value is None else value
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not (0 <= value <= 1 if field == "score" else value > 0):
            return InvalidDocument(f"{where}: {field} = {value!r} is not valid: it must be {legal}")
        numbers.append(float(value))
    return Document(record[fields.text], source, language, numbers[0], numbers[1], where)
