"""One unit of raw files -> documents -> tables of normalised documents with their language and hash.

What cannot be read is reported and skipped, never fatal, never silent.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from bc2_jax.curate.inputs import ReadConfig, Unit, default_source
from bc2_jax.curate.languages import identify_languages
from bc2_jax.curate.normalization import large_strings, normalize_texts
from bc2_jax.curate.problems import UnitReport
from bc2_jax.data.documents import why_no_text
from bc2_jax.data.encodings import is_wide
from bc2_jax.data.parquet import is_text, open_parquet, read_row_group, why_no_texts
from bc2_jax.data.records import Invalid, LineReader, Record, open_text, read_text
from bc2_jax.data.text_files import TextFile, open_binary

if TYPE_CHECKING:
    import pyarrow as pa

# A longer id, source or language is not a name.
_NAME_CHARACTERS = 500
# Text bytes of a batch, about: each batch has a cost.
_BATCH_BYTES = 4 << 20
_MOST_ROWS = 65536
# Documents of the largest size that a Parquet page may hold: it is in memory whole, several times.
_PAGE_DOCUMENTS = 8


@dataclasses.dataclass
class Rows:
    """Documents in order, as parallel lists."""

    ids: list[str] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    sources: list[str] = dataclasses.field(default_factory=list)
    languages: list[str] = dataclasses.field(default_factory=list)
    """What the row says about its language; "" if nothing."""
    places: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    """File, line and byte, as in Problem."""


def read_unit(unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    """The documents of a unit in batches of a few MiB; fills `report`.

    Every text is valid Unicode (no lone surrogates) of at most config.max_document_bytes in UTF-8.
    """
    if unit.files[0].kind == "text":
        yield from _read_texts(unit, config, report)
        return
    file = unit.files[0]
    try:
        with open_binary(file.path) as stream:
            if _has_content(stream, file, report):
                reader = _read_parquet if file.kind == "parquet" else _read_lines
                yield from reader(stream, unit, config, report)
    except OSError as error:
        report.add(file.name, "cannot be read", rows=0, content=error)


def _has_content(stream: IO[bytes] | Any, file: TextFile, report: UnitReport) -> bool:
    size = stream.seek(0, 2)
    stream.seek(0)
    if size != file.size:
        content = f"{size} bytes instead of {file.size}"
        report.add(file.name, "the file has changed since it was planned", rows=0, content=content)
    elif not size:
        report.add(file.name, "the file is empty", rows=0)
    return size > 0


class _RowCheck:
    """Checks the records of one file; good ones become Rows, the others problems of the report."""

    def __init__(self, file: TextFile, config: ReadConfig, report: UnitReport) -> None:
        self.file, self.config, self.report = file, config, report
        self.source = _name(default_source(file)) or "unnamed"
        self.rows, self.size = Rows(), 0

    def add(self, found: Record | Invalid, place: str = "") -> None:
        """`place` completes the file's name to an id where the record has none."""
        if isinstance(found, Invalid):
            self.report.add(
                self.file.name, found.reason, line=found.line, byte=found.byte, rows=found.records,
                content=found.content,
            )  # fmt: skip
            return
        fields, config = found.value, self.config
        reason = (why_no_text(fields, config.text_field) or "").partition(" (")[0]
        size = 0
        if not reason:
            text = fields[config.text_field]
            size = len(text) if text.isascii() else len(text.encode())
            if size > config.max_document_bytes:
                reason = "the text is longer than max_document_bytes"
        if reason:
            content = fields if not isinstance(fields, dict) else fields.get(config.text_field, list(fields)[:8])
            self.report.add(
                self.file.name, reason, line=found.line, byte=found.byte, content=_beginning(content)
            )  # fmt: skip
            return
        self.report.text_bytes += size
        self.size += size
        rows = self.rows
        rows.texts.append(text)
        rows.ids.append(_name(fields.get(config.id_field)) or f"{self.file.name}{place}")
        rows.sources.append(_name(fields.get(config.source_field)) or self.source)
        rows.languages.append(_name(fields.get(config.language_field)))
        rows.places.append((self.file.name, found.line, found.byte))

    def take(self) -> Rows:
        rows, self.rows, self.size = self.rows, Rows(), 0
        return rows


def _name(value: object) -> str:
    """A string or an integer as a short printable string; "" for everything else."""
    if isinstance(value, str):
        if len(value) > _NAME_CHARACTERS:
            return ""
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64 else ""


def _beginning(value: object) -> object:
    """As much of a value as an excerpt needs: it may be very long."""
    return value[:1000] if isinstance(value, (str, bytes, list)) else type(value).__name__ if value else value


def _read_lines(stream: IO[bytes] | Any, unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    (file,) = unit.files
    report.raw_bytes += unit.stop - unit.start
    stream.seek(max(0, unit.start - 1))
    read, piece = open_text(stream, file.compression)
    whole = file.compression is not None or is_wide(config.encoding)
    reader = LineReader(
        read, file.name, start=unit.start, stop=None if whole else unit.stop,
        piece=piece if whole else min(piece, unit.stop - unit.start), compressed=file.compression is not None,
        encoding=config.encoding, limit=config.max_line_bytes, limit_name="2.5 * max_document_bytes",
    )  # fmt: skip
    check = _RowCheck(file, config, report)
    for block in reader:
        for found in block:
            check.add(found, f"@{found.byte}")
        if check.size >= _BATCH_BYTES:
            yield check.take()
    report.lines += reader.line
    if check.rows.texts:
        yield check.take()


def _read_texts(unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    """One document a file."""
    rows, size = Rows(), 0
    for file in unit.files:
        report.raw_bytes += file.size
        check = _RowCheck(file, config, report)
        try:
            with open_binary(file.path) as stream:
                if not _has_content(stream, file, report):
                    continue
                limit, limit_name = config.max_document_bytes, "max_document_bytes"
                text = read_text(stream, file.name, file.compression, config.encoding, limit, limit_name)
        except OSError as error:
            report.add(file.name, "cannot be read", content=error)
            continue
        check.add(text if isinstance(text, Invalid) else Record({config.text_field: text}, file.name, 0, 0))
        size += check.size
        for mine, new in zip(vars(rows).values(), vars(check.take()).values(), strict=True):
            mine.extend(new)
        if size > _BATCH_BYTES:
            yield rows
            rows, size = Rows(), 0
    if rows.texts:
        yield rows


def _read_parquet(stream: IO[bytes] | Any, unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    (file,) = unit.files
    check = _RowCheck(file, config, report)
    parquet = open_parquet(stream, file.name)
    if isinstance(parquet, Invalid):
        report.raw_bytes += file.size
        check.add(parquet)
        return
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    # A footer that could not be read when the units were planned gave one unit, which has to read what there is now.
    stop = unit.stop or len(groups)
    if stop > len(groups):
        content = f"{len(groups)} row groups instead of {stop} or more"
        report.add(file.name, "row groups are missing", rows=0, content=content)
    row = 1 + sum(group.num_rows for group in groups[: unit.start])
    sizes = [group.total_byte_size for group in groups]
    report.raw_bytes += round(file.size * sum(sizes[unit.start : stop]) / max(1, sum(sizes)))
    schema = parquet.schema_arrow
    if reason := why_no_texts(schema, config.text_field):
        total = sum(group.num_rows for group in groups[unit.start : stop])
        report.add(file.name, reason, line=row, rows=total, content=", ".join(schema.names))
        return
    columns = [config.text_field]
    for field in (config.id_field, config.source_field, config.language_field):
        place = schema.get_field_index(field)
        if place >= 0 and field not in columns and _is_name(schema.field(place).type):
            columns.append(field)
    for index, group in enumerate(groups[unit.start : stop], unit.start):
        for batch in read_row_group(
            parquet, stream, index, row, file.name, columns=columns, most_rows=_MOST_ROWS,
            page_limit=_PAGE_DOCUMENTS * config.max_document_bytes,
            limit_name=f"{_PAGE_DOCUMENTS} * max_document_bytes",
        ):  # fmt: skip
            for found in batch:
                check.add(found, f"@{found.line}")
            yield check.take()
        row += group.num_rows


def _is_name(kind: Any) -> bool:
    import pyarrow as pa

    return is_text(kind) or pa.types.is_integer(kind)


# --------------------------------------------------------------------------------------------------------------- tables


def read_shards(unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[pa.Table]:
    """Tables of about config.shard_bytes of text each, in the order of the raw files.

    Columns: doc int64 (unit << 32 | running number), id string, text large_string (normal form, not empty), source
    string, language string, h1 and h2 int64 (128 bits of BLAKE2b of the text's UTF-8). report is complete when the last
    table was taken.
    """
    import pyarrow as pa

    batches: list[pa.RecordBatch] = []
    size = 0
    for rows in read_unit(unit, config, report):
        batch = _normal_batch(rows, report)
        if batch is not None:
            batches.append(batch)
            size += batch.nbytes
        if size >= config.shard_bytes:
            yield pa.Table.from_batches(batches).combine_chunks()
            batches, size = [], 0
    if batches:
        yield pa.Table.from_batches(batches).combine_chunks()


def _normal_batch(rows: Rows, report: UnitReport) -> pa.RecordBatch | None:
    import pyarrow as pa

    texts, changed = normalize_texts(rows.texts)
    report.normalized.update(changed)
    kept = [i for i, text in enumerate(texts) if text]
    if len(kept) < len(texts):
        for i, text in enumerate(texts):
            if not text:
                file, line, byte = rows.places[i]
                report.add(file, "the text is empty", line=line, byte=byte, content=rows.ids[i])
        texts = [texts[i] for i in kept]
    if not texts:
        return None
    ids, sources, hints = ([column[i] for i in kept] for column in (rows.ids, rows.sources, rows.languages))
    languages = identify_languages(texts, hints, sources)
    report.languages.update(languages)
    encoded = [text.encode() for text in texts]
    hashes = hash_texts(encoded)
    first = (report.unit << 32) + report.documents
    report.documents += len(texts)
    report.normal_bytes += sum(map(len, encoded))
    columns = {
        "doc": pa.array(np.arange(first, first + len(texts))),
        "id": pa.array(ids, pa.string()),
        "text": large_strings(texts, encoded),
        "source": pa.array(sources, pa.string()),
        "language": pa.array(languages, pa.string()),
        "h1": pa.array(hashes[:, 0]),
        "h2": pa.array(hashes[:, 1]),
    }
    return pa.RecordBatch.from_pydict(columns)


def hash_texts(encoded: Sequence[bytes]) -> np.ndarray:
    """int64 [D, 2]: BLAKE2b of 16 bytes, little-endian; equal on every machine, 1 GB/s, and no text can be made to
    collide with another."""
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in encoded)
    return np.frombuffer(digests, "<i8").reshape(-1, 2)
