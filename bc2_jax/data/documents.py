"""Files of text (`text_files`) -> documents.

Besides its text a record may have a `source` (else the name of the file's folder), a `language` (else "unknown"), a
`score` for quality in 0..1 (else 1) and a sampling `weight` (else 1). What can't be read becomes an `InvalidDocument`
that names the file and the line or row, counted from 1; reading goes on behind it where that is possible.

A file is read in spans, each by itself, so that processes can share the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bc2_jax.data.decompression import Decompressed
from bc2_jax.data.records import (
    Invalid,
    Record,
    decode,
    first_line,
    import_arrow,
    read_lines,
    read_row_group,
)
from bc2_jax.data.text_files import LEGAL, Kind, kind_of
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
    """Takes the place of a document that could not be read, so that it is counted and logged."""

    reason: str
    documents: int = 1
    """How many are lost, as far as it is known."""


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
    """A file, what identifies its content, and its spans; none if it can't be read at all, for `problem`."""

    path: str
    size: int
    sha256: str
    spans: tuple[Span, ...]
    problem: str | None = None


def scan_file(path: str | os.PathLike[str], fields: Fields, span_bytes: int) -> ScannedFile:
    """Reads a file once for its SHA-256 and for spans of about `span_bytes`; of a .parquet, a span is a row group."""
    name = os.fspath(path)
    digest = hashlib.sha256()
    size, line, spans = 0, 1, []
    start, first = 0, 1
    kind, compression = _kind(name)
    cut_lines = kind == "jsonl" and compression is None
    with open(name, "rb") as file:
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
    if size > start or not cut_lines:
        spans.append(Span(name, start, size, first, size - start))
    problem = None
    if kind == "parquet":
        spans, problem = _row_groups(name, fields)
    return ScannedFile(name, size, digest.hexdigest(), tuple(spans), problem)


def read_span(span: Span, fields: Fields) -> Iterator[Document | InvalidDocument]:
    """The documents of one span in order."""
    kind, compression = _kind(span.file)
    if kind == "text":
        yield from _read_text(span, compression)
        return
    found = _read_lines(span, compression) if kind == "jsonl" else _read_row_group(span, fields)
    for record in found:
        if isinstance(record, Invalid):
            yield InvalidDocument(str(record), record.records)
        else:
            yield _document(record.value, fields, span.file, record.where)
        del record


def _kind(path: str) -> tuple[Kind, str | None]:
    kind = kind_of(path)
    require(kind is not None, "INPUT", path, f"files must be {LEGAL}")
    assert kind is not None
    return kind


def why_invalid(document: object) -> str | None:
    """Why `document` can't be packed, or None if it can."""
    if isinstance(document, InvalidDocument):
        return document.reason
    if not isinstance(document, str):
        return f"it is not a string but {type(document).__name__}"
    try:
        for start in range(0, len(document), _BLOCK):
            document[start : start + _BLOCK].encode()
    except UnicodeEncodeError as error:
        return f"it has a lone surrogate at character {start + error.start}"
    return None


def _read_text(span: Span, compression: str | None) -> Iterator[Document | InvalidDocument]:
    try:
        with open(span.file, "rb") as file:
            content = (Decompressed(file, compression) if compression else file).read()
    except OSError as error:
        yield InvalidDocument(f"{span.file}: {error}")
        return
    text = decode(content, span.file)
    if isinstance(text, Invalid):
        yield InvalidDocument(str(text))
    else:
        yield _document({"text": text}, Fields(), span.file, span.file)


def _read_lines(span: Span, compression: str | None) -> Iterator[Record | Invalid]:
    with open(span.file, "rb") as file:
        if compression:
            lines: Any = io.BufferedReader(Decompressed(file, compression), _BLOCK)
            yield from read_lines(lines, span.file, span.first)
        else:
            file.seek(span.start)
            yield from read_lines(file, span.file, span.first, span.stop - span.start)


def _document(record: Any, fields: Fields, file: str, where: str) -> Document | InvalidDocument:
    if not isinstance(record, dict) or fields.text not in record:
        return InvalidDocument(f"{where}: it is not an object with a field {fields.text!r}")
    text, source = record[fields.text], record.get(fields.source)
    if reason := why_invalid(text):
        return InvalidDocument(f"{where}: in field {fields.text!r}, {reason}")
    if source is None or source == "":
        source = Path(file).resolve().parent.name
    if reason := why_invalid(source):
        return InvalidDocument(f"{where}: in field {fields.source!r}, {reason}")
    language = record.get("language") or "unknown"
    if reason := why_invalid(language):
        return InvalidDocument(f"{where}: in field 'language', {reason}")
    numbers = []
    for field, legal in (("score", "in 0..1"), ("weight", "positive")):
        value = record.get(field)
        value = 1.0 if value is None else value
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not (0 <= value <= 1 if field == "score" else value > 0):
            return InvalidDocument(f"{where}: {field} = {value!r} is not valid: it must be {legal}")
        numbers.append(float(value))
    return Document(text, source, language, numbers[0], numbers[1], where)


def _row_groups(file: str, fields: Fields) -> tuple[list[Span], str | None]:
    parquet, pyarrow = import_arrow("pyarrow.parquet"), import_arrow("pyarrow")
    try:
        with parquet.ParquetFile(file) as opened:
            metadata, columns = opened.metadata, opened.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        return [], f"{file}: it is not a complete Parquet file ({first_line(error)})"
    if fields.text not in columns:
        return [], f"{file}: it has no column {fields.text!r}, only {', '.join(columns)}"
    spans, row = [], 1
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        spans.append(Span(file, index, index + 1, row, group.total_byte_size))
        row += group.num_rows
    return spans, None


def _read_row_group(span: Span, fields: Fields) -> Iterator[Record | Invalid]:
    names = (fields.text, fields.source, "language", "score", "weight")
    return read_row_group(span.file, span.file, span.start, span.first, names)
