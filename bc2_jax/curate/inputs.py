"""Planning the reading of raw files: units of work (byte ranges of JSON lines, row groups, batches of text files)."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

from bc2_jax.data.encodings import check_encoding, is_wide
from bc2_jax.data.parquet import open_parquet
from bc2_jax.data.records import Invalid
from bc2_jax.data.text_files import COMPRESSIONS, SUFFIXES, TextFile, open_binary, printable
from bc2_jax.validation import require, require_positive

# Most text files of a unit.
_FILES_PER_UNIT = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How raw files are read."""

    text_field: str = "text"
    """Field or column of a document's text."""
    id_field: str = "id"
    """Field or column of a document's id, a string or an integer. Default: FILE@BYTE (of the beginning of the line,
    decompressed) for JSON lines, FILE@ROW for parquet, FILE for a text file."""
    source_field: str = "source"
    """Field or column of a document's source. Default: the file's name without suffix and shard number, or its folder's
    name if nothing is left and for text files."""
    language_field: str = "language"
    """Field or column of a document's language, used if it is `code` or a language code."""
    encoding: str = "utf-8"
    """Encoding of .jsonl, .json and .txt files: utf-8, gb18030 (GBK and GB2312 too), big5, utf-16, latin-1, ..."""
    unit_bytes: int = 32 << 20
    """Bytes of raw files that one unit reads. A compressed file, and one in UTF-16 or UTF-32, is always one unit."""
    shard_bytes: int = 24 << 20
    """Text bytes of a shard; a unit is written as several."""
    max_document_bytes: int = 16 << 20
    """Longest text, in UTF-8 bytes. A JSON line may be 2.5 times as long (escapes, other fields). What is longer is
    reported and skipped without holding it in memory."""

    def __post_init__(self) -> None:
        require_positive(self, "read.", "unit_bytes", "shard_bytes", "max_document_bytes")
        for field in ("text_field", "id_field", "source_field", "language_field"):
            require(bool(getattr(self, field)), f"read.{field}", getattr(self, field), "it must name a field")
        check_encoding("read.encoding", self.encoding)

    @property
    def max_line_bytes(self) -> int:
        return self.max_document_bytes * 5 // 2


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit of work: what one task reads."""

    index: int
    files: tuple[TextFile, ...]
    """One file, or several text files."""
    start: int
    """First byte (JSON lines) or row group (parquet)."""
    stop: int
    """One past the last. A line belongs to the range in which it begins."""


def default_source(file: TextFile) -> str:
    """web/zh-00001-of-00010.jsonl.zst -> zh; web/0001.parquet and web/page.txt -> web."""
    parts = file.name.rstrip("/").split("/")
    stem = parts[-1]
    while os.path.splitext(stem)[1].lower() in (*SUFFIXES, *COMPRESSIONS):
        stem = os.path.splitext(stem)[0]
    stem = re.sub(r"(?:^|[-_.])(?:part|shard|chunk|train)?[-_.]?\d+(?:[-_.]of[-_.]\d+)?$", "", stem)
    folder = os.path.dirname(file.path.rstrip("/")).rsplit("/", 1)[-1]
    if file.kind == "text" or not stem:
        return printable(parts[-2] if len(parts) > 1 else folder or "text")
    return stem


def plan_units(files: Sequence[TextFile], config: ReadConfig) -> list[Unit]:
    """Units in the order of files. Reads only the footers of parquet files."""
    units: list[Unit] = []
    texts: list[TextFile] = []

    def add(files: Sequence[TextFile], start: int, stop: int) -> None:
        units.append(Unit(len(units), tuple(files), start, stop))

    def flush() -> None:
        if texts:
            add(texts, 0, len(texts))
            texts.clear()

    size = 0
    for file in files:
        if file.kind == "text":
            if len(texts) == _FILES_PER_UNIT or (texts and size + file.size > config.unit_bytes):
                flush()
            size = file.size + (size if texts else 0)
            texts.append(file)
            continue
        flush()
        if file.kind == "parquet":
            for start, stop in _row_groups(file, config.unit_bytes):
                add([file], start, stop)
        elif file.compression or not file.size or is_wide(config.encoding):
            add([file], 0, file.size)
        else:
            for start in range(0, file.size, config.unit_bytes):
                add([file], start, min(start + config.unit_bytes, file.size))
    flush()
    return units


def _row_groups(file: TextFile, unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges of row groups of about unit_bytes. An unreadable file gives one range, so that reading it reports why."""
    try:
        with open_binary(file.path) as stream:
            parquet = open_parquet(stream, file.name)
            if isinstance(parquet, Invalid):
                return [(0, 0)]
            metadata = parquet.metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except OSError:
        return [(0, 0)]
    ranges = []
    start = size = 0
    for index, bytes_of_group in enumerate(sizes):
        if index > start and size + bytes_of_group > unit_bytes:
            ranges.append((start, index))
            start, size = index, 0
        size += bytes_of_group
    return [*ranges, (start, len(sizes))]
