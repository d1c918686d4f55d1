"""Files of text -> documents.

    .parquet      a row is a document; also the folder that the curation writes (its documents/*.parquet)
    .jsonl        a line is a document, a JSON object
    .jsonl.zst    the same, compressed with Zstandard
    .txt          a file is a document

Besides its text a record may have a `source` (else the name of the file's folder), a `language` (else "unknown"), a
`score` for quality in 0..1 (else 1) and a sampling `weight` (else 1). What can't be read becomes an `InvalidDocument`
that names the file and the line or row, counted from 1; reading goes on behind it where that is possible.

A file is read in spans, each by itself, so that processes can share the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
LONGEST_LINE = 1 << 30
"""Bytes of a .jsonl line; a longer one is an invalid document, which is never held in memory."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK = 1 << 20
_ROWS_AT_A_TIME = 64


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


def find_files(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files of `inputs` in their order; a folder stands for the files below it, sorted by path.

    Of a folder that the curation wrote, only those in its `documents` are taken; names that begin
    with . or _ are not. Raises FileNotFoundError or ValueError, naming the input, if one is missing, has nothing
    to read or comes twice.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise FileNotFoundError(f"INPUT = {str(path)!r} does not exist.")
        found = [path]
        if path.is_dir():
            curated = path / "documents"
            folder = curated if curated.is_dir() else path
            found = sorted(
                file
                for file in folder.rglob("*")
                if file.name.endswith(SUFFIXES) and not any(p[0] in "._" for p in file.relative_to(folder).parts)
            )
        if not found or not found[0].name.endswith(SUFFIXES):
            raise ValueError(
                f"INPUT = {str(path)!r} is not valid: it must be {', '.join(SUFFIXES)} or a folder with such files."
            )
        files += found
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"INPUT = {str(file)!r} is not valid: it is given twice.")
        seen.add(file.resolve())
    return files


def scan_file(path: str | os.PathLike[str], fields: Fields, span_bytes: int) -> ScannedFile:
    """Reads a file once for its SHA-256 and for spans of about `span_bytes`; of a .parquet, a span is a row group."""
    name = os.fspath(path)
    digest = hashlib.sha256()
    size, line, spans = 0, 1, []
    start, first = 0, 1
    cut_lines = name.endswith(".jsonl")
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
    if name.endswith(".parquet"):
        spans, problem = _row_groups(name, fields)
    return ScannedFile(name, size, digest.hexdigest(), tuple(spans), problem)


def read_span(span: Span, fields: Fields) -> Iterator[Document | InvalidDocument]:
    """The documents of one span in order."""
    if span.file.endswith(".parquet"):
        return _read_row_group(span, fields)
    if span.file.endswith(".txt"):
        return _read_text(span)
    return _read_lines(span, fields)


def why_invalid(document: object) -> str | None:
    """Why `document` can't be packed, or None if it can."""
    if isinstance(document, InvalidDocument):
        return document.reason
    if not isinstance(document, str):
        return f"it is no string but {type(document).__name__}"
    try:
        for start in range(0, len(document), _BLOCK):
            document[start : start + _BLOCK].encode()
    except UnicodeEncodeError as error:
        return f"it has a lone surrogate at character {start + error.start}"
    return None


def _read_text(span: Span) -> Iterator[Document | InvalidDocument]:
    text = _decode(Path(span.file).read_bytes(), span.file)
    yield text if isinstance(text, InvalidDocument) else _document({"text": text}, Fields(), span.file, span.file)


def _read_lines(span: Span, fields: Fields) -> Iterator[Document | InvalidDocument]:
    number = span.first
    with open(span.file, "rb") as file:
        lines: BinaryIO = file
        if span.file.endswith(".zst"):
            lines = io.BufferedReader(_ZstdReader(file), _BLOCK)  # type: ignore[assignment]
        else:
            file.seek(span.start)
        position = span.start
        while True:
            where = f"{span.file}:{number}"
            try:
                line, size = _read_line(lines)
            except _DamagedError as error:
                yield InvalidDocument(f"{where}: {error}; this and what follows in the file is lost")
                return
            if not size:
                return
            if line is None:
                yield InvalidDocument(f"{where}: the line has {size} bytes, more than {LONGEST_LINE}")
            elif not line.isspace():
                found: Any = _decode(line, where)
                del line  # it may be large: two copies exist while JSON is read, one after that
                if isinstance(found, str):
                    found = _parse(found, fields, span.file, where)
                yield found
                del found
            number += 1
            position += size
            if position >= span.stop and lines is file:
                return


def _read_line(lines: BinaryIO) -> tuple[bytes | None, int]:
    """A line and its size; None in place of one that is too long; size 0 at the end."""
    line = lines.readline(LONGEST_LINE + 1)
    size = len(line)
    if size <= LONGEST_LINE:
        return line, size
    while not line.endswith(b"\n") and (line := lines.readline(_BLOCK)):
        size += len(line)
    return None, size


def _decode(content: bytes, where: str) -> str | InvalidDocument:
    try:
        return content.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        return InvalidDocument(f"{where}: it is not UTF-8 ({error.reason} at byte {error.start})")


def _parse(line: str, fields: Fields, file: str, where: str) -> Document | InvalidDocument:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InvalidDocument(f"{where}: it is not JSON ({error})")
    return _document(record, fields, file, where)


def _document(record: Any, fields: Fields, file: str, where: str) -> Document | InvalidDocument:
    if not isinstance(record, dict) or fields.text not in record:
        return InvalidDocument(f"{where}: it is no object with a field {fields.text!r}")
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


class _DamagedError(Exception):
    """The content of a file is damaged from here on."""


class _ZstdReader(io.RawIOBase):
    """Decompresses frames one after another; unlike zstandard's own reader it notices an end in the middle of one."""

    def __init__(self, file: BinaryIO) -> None:
        self._zstandard = _import("zstandard", ".jsonl.zst")
        self._file, self._output = file, memoryview(b"")
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            content = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            content = content or self._file.read(1 << 14)  # little: a byte may stand for thousands
            if not content:
                if self._frame is not None and not self._frame.eof:
                    raise _DamagedError("the Zstandard data ends in the middle")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(content))
            except self._zstandard.ZstdError as error:
                raise _DamagedError(f"the Zstandard data is damaged ({error})") from error
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def _row_groups(file: str, fields: Fields) -> tuple[list[Span], str | None]:
    parquet = _import("pyarrow.parquet", ".parquet")
    pyarrow = _import("pyarrow", ".parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            metadata, columns = opened.metadata, opened.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        return [], f"{file}: it is no complete Parquet file ({_first_line(error)})"
    if fields.text not in columns:
        return [], f"{file}: it has no column {fields.text!r}, only {', '.join(columns)}"
    spans, row = [], 1
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        spans.append(Span(file, index, index + 1, row, group.total_byte_size))
        row += group.num_rows
    return spans, None


def _read_row_group(span: Span, fields: Fields) -> Iterator[Document | InvalidDocument]:
    parquet = _import("pyarrow.parquet", ".parquet")
    pyarrow = _import("pyarrow", ".parquet")
    with parquet.ParquetFile(span.file, page_checksum_verification=True) as opened:
        rows = opened.metadata.row_group(span.start).num_rows
        names = (fields.text, fields.source, "language", "score", "weight")
        columns = [name for name in opened.schema_arrow.names if name in names]
        done = 0
        try:
            for batch in opened.iter_batches(_ROWS_AT_A_TIME, row_groups=[span.start], columns=columns):
                values = [_values(column, pyarrow) for column in batch.columns]
                for record in zip(*values, strict=True):
                    done += 1
                    where = f"{span.file}:{span.first + done - 1}"
                    bad = next((value for value in record if isinstance(value, InvalidDocument)), None)
                    yield (
                        InvalidDocument(f"{where}: {bad.reason}")
                        if bad is not None
                        else _document(dict(zip(columns, record, strict=True)), fields, span.file, where)
                    )
        except (pyarrow.ArrowException, OSError) as error:
            last = span.first + rows - 1
            reason = f"{span.file}: rows {span.first + done}-{last} can't be read ({_first_line(error)})"
            yield InvalidDocument(reason, rows - done)


def _values(column: Any, pyarrow: Any) -> list[Any]:
    """The values of a column; Parquet promises UTF-8, but nobody checks it."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        content = column.cast(pyarrow.binary()).to_pylist()
        return [None if value is None else _decode(value, "in text") for value in content]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _import(module: str, suffix: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ValueError(f"{suffix} files need {name}: pip install 'bc2_jax[data]'.") from error
