"""One unit of raw files -> documents. What cannot be read is reported and skipped, never fatal, never silent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import IO, Any

from bc2_jax.curate.inputs import ReadConfig, Unit, default_source
from bc2_jax.curate.lines import Block, Broken, decompressed, line_blocks
from bc2_jax.curate.parquet_pages import largest_page
from bc2_jax.curate.problems import UnitReport
from bc2_jax.data.encodings import BYTE_ORDER_MARK, hint, is_utf8, is_wide, transcoded
from bc2_jax.data.text_files import TextFile, open_binary

# A longer id, source or language is not a name.
_NAME_CHARACTERS = 500
# Text bytes of a batch, about: what looks at a batch has a cost a batch.
_BATCH_BYTES = 4 << 20
# A parquet page is in memory whole, several times; one of more than so many documents of the largest size is refused.
_PAGE_DOCUMENTS = 8
# Lines that are not UTF-8 by which the encoding of a file is guessed.
_LOOKED_AT = 8


@dataclasses.dataclass
class Rows:
    """Some documents in their order, as parallel lists."""

    ids: list[str] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    sources: list[str] = dataclasses.field(default_factory=list)
    languages: list[str] = dataclasses.field(default_factory=list)
    """What the row says about its language; "" if nothing."""
    places: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    """File, line and byte, as in Problem."""


def read_unit(unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    """The documents of a unit, in batches of a few MiB; report is filled on the way.

    Every text is valid Unicode (no lone surrogates) of at most config.max_document_bytes in UTF-8.
    """
    if unit.files[0].kind == "text":
        yield from _read_texts(unit, config, report)
        return
    file = unit.files[0]
    try:
        with open_binary(file.path) as stream:
            if not _check_size(stream, file, report):
                return
            reader = _read_parquet if file.kind == "parquet" else _read_lines
            yield from reader(stream, unit, config, report)
    except OSError as error:
        report.add(file.name, "cannot be read", rows=0, content=error)


def _check_size(stream: IO[bytes] | Any, file: TextFile, report: UnitReport) -> bool:
    """Whether there is anything to read."""
    size = stream.seek(0, 2)
    stream.seek(0)
    if size != file.size:
        content = f"{size} bytes instead of {file.size}"
        report.add(file.name, "the file has changed since it was planned", rows=0, content=content)
    elif not size:
        report.add(file.name, "the file is empty", rows=0)
    return size > 0


class _RowCheck:
    """Takes the fields of one row after the other; good ones become Rows."""

    def __init__(self, file: TextFile, config: ReadConfig, report: UnitReport) -> None:
        self.file, self.config, self.report = file, config, report
        self.source = _name(default_source(file)) or "unnamed"
        self.rows, self.size = Rows(), 0
        self._hint, self._looked_at = "", 0

    def add(self, fields: Any, place: str, line: int, byte: int) -> None:
        """fields: what should be a dict; place: stands for an id that the row does not have."""
        config = self.config
        reason = None
        if not isinstance(fields, dict):
            reason = "the row is not an object"
        elif config.text_field not in fields:
            reason = f"the row has no field {config.text_field!r}"
        else:
            text = fields[config.text_field]
            if not isinstance(text, str):
                reason = f"field {config.text_field!r} is {_kind(text)}, not a string"
        if reason is None:
            try:
                size = len(text) if text.isascii() else len(text.encode())
            except UnicodeEncodeError:
                reason = "the text has half of a surrogate pair"
            else:
                if size > config.max_document_bytes:
                    reason = "the text is longer than max_document_bytes"
        if reason is not None:
            content = fields if not isinstance(fields, dict) else fields.get(config.text_field, list(fields)[:8])
            self.report.add(self.file.name, reason, line=line, byte=byte, content=_beginning(content))
            return
        self.report.text_bytes += size
        self.size += size
        rows = self.rows
        rows.texts.append(text)
        rows.ids.append(_name(fields.get(config.id_field)) or f"{self.file.name}{place}")
        rows.sources.append(_name(fields.get(config.source_field)) or self.source)
        rows.languages.append(_name(fields.get(config.language_field)))
        rows.places.append((self.file.name, line, byte))

    def why_no_text(self, what: str, data: bytes) -> str:
        """The reason for a line or file that can't be decoded."""
        if not is_utf8(self.config.encoding):
            return f"the {what} is not {self.config.encoding.upper()}"
        return f"the {what} is not UTF-8{self.hint(data)}"

    def hint(self, data: bytes) -> str:
        """What the file's encoding may be; only the first such lines are looked at, for there may be millions."""
        if not self._hint and self._looked_at < _LOOKED_AT:
            self._looked_at += 1
            self._hint = hint(data)
        return self._hint

    def take(self) -> Rows:
        rows, self.rows, self.size = self.rows, Rows(), 0
        return rows


def _name(value: object) -> str:
    """A string or an integer as a short string that can be written; "" for everything else."""
    if isinstance(value, str):
        if len(value) > _NAME_CHARACTERS:
            return ""
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64 else ""


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", bool: "a truth value", bytes: "bytes", type(None): "null"}
    return kinds.get(type(value), "a number")


def _beginning(value: object) -> object:
    """So much of a value as an excerpt may need: it may be very long."""
    return value[:1000] if isinstance(value, (str, bytes, list)) else type(value).__name__ if value else value


def _read_lines(stream: IO[bytes] | Any, unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    (file,) = unit.files
    report.raw_bytes += unit.stop - unit.start
    stream.seek(max(0, unit.start - 1))
    read, piece = decompressed(stream, file.compression)
    encoding, wide = config.encoding, is_wide(config.encoding)
    if wide:
        read, encoding = transcoded(read, encoding), "utf-8"
    stop = None if file.compression or wide else unit.stop
    if stop is not None:
        piece = min(piece, unit.stop - unit.start)
    check = _RowCheck(file, config, report)
    decode = json.JSONDecoder().decode
    for event in line_blocks(read, unit.start, stop, config.max_line_bytes, piece):
        if isinstance(event, Broken):
            content = f"{event.reason} at byte {event.position}; the line there: {_printed(event.unfinished)}"
            lost = "the rest of the file is lost: it cannot be " + ("decompressed" if file.compression else "read")
            cut = int(bool(event.unfinished))
            report.add(file.name, lost, line=report.lines + 1, byte=event.position, rows=cut, content=content)
            break
        if not isinstance(event, Block):
            report.lines += 1
            content = f"{event.length} bytes: {_printed(event.beginning)}"
            report.add(file.name, _LONG, line=report.lines, byte=event.start, content=content)
            continue
        start = event.start
        for raw in event.data.split(b"\n"):
            report.lines += 1
            byte, start = start, start + len(raw) + 1
            if len(raw) > config.max_line_bytes:
                content = f"{len(raw)} bytes: {_printed(raw[:256])}"
                report.add(file.name, _LONG, line=report.lines, byte=byte, content=content)
                continue
            try:
                text = raw.decode(encoding)
                if byte == 0:
                    text = text.removeprefix(BYTE_ORDER_MARK)
                fields = decode(text)
            except UnicodeDecodeError as error:
                bad = raw[max(0, error.start - 16) :][:256]
                report.add(file.name, check.why_no_text("line", raw), line=report.lines, byte=byte, content=bad)
            except (ValueError, RecursionError):
                if text.strip():
                    # UTF-16 of ASCII is legal UTF-8.
                    reason = "the line is not JSON" + (check.hint(raw) if "\0" in text else "")
                    report.add(file.name, reason, line=report.lines, byte=byte, content=raw[:256])
            else:
                check.add(fields, f"@{byte}", report.lines, byte)
        if check.size >= _BATCH_BYTES:
            yield check.take()
    if check.rows.texts:
        yield check.take()


_LONG = "the line is longer than 2.5 * max_document_bytes"


def _printed(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _read_texts(unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    """One document a file."""
    size = 0
    rows = Rows()
    for file in unit.files:
        report.raw_bytes += file.size
        try:
            with open_binary(file.path) as stream:
                if not _check_size(stream, file, report):
                    continue
                read, _ = decompressed(stream, file.compression)
                # One byte more than is legal tells what is too long; UTF-8 is at most four times as short.
                limit = config.max_document_bytes * (1 if is_utf8(config.encoding) else 4)
                data = _read_all(read, limit + 1)
        except OSError as error:
            compressed = "cannot be decompressed" if file.compression else "cannot be read"
            report.add(file.name, compressed, content=error)
            continue
        check = _RowCheck(file, config, report)
        try:
            text = data.decode(config.encoding).removeprefix(BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            if len(data) <= limit:
                content = data[max(0, error.start - 16) :][:256]
                report.add(file.name, check.why_no_text("file", data), byte=error.start, content=content)
                continue
            # It is too long, and may have been cut inside a character.
            text = data.decode(config.encoding, "replace")
        check.add({config.text_field: text}, "", 0, 0)
        for mine, new in zip(vars(rows).values(), vars(check.take()).values(), strict=True):
            mine.extend(new)
        size += len(data)
        if size > _BATCH_BYTES and rows.texts:
            yield rows
            rows, size = Rows(), 0
    if rows.texts:
        yield rows


def _read_all(read: Any, limit: int) -> bytes:
    parts = []
    while limit > 0 and (data := read(min(limit, 1 << 20))):
        parts.append(data)
        limit -= len(data)
    return b"".join(parts)


def _read_parquet(stream: IO[bytes] | Any, unit: Unit, config: ReadConfig, report: UnitReport) -> Iterator[Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (file,) = unit.files
    try:
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        report.raw_bytes += file.size
        report.add(file.name, "the file is no whole parquet file", rows=0, content=error)
        return
    metadata, schema = parquet.metadata, parquet.schema_arrow
    # A footer that could not be read when the units were planned gave one unit, which has to read what there is now.
    stop = unit.stop or metadata.num_row_groups
    if stop > metadata.num_row_groups:
        content = f"{metadata.num_row_groups} row groups instead of {stop} or more"
        report.add(file.name, "row groups are missing", rows=0, content=content)
    # ColumnChunkMetaData is asked only where it must be: pyarrow 25 aborts the process for some that are corrupt.
    row_groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    groups = row_groups[unit.start : stop]
    row = sum(group.num_rows for group in row_groups[: unit.start])
    sizes = [group.total_byte_size for group in row_groups]
    report.raw_bytes += round(file.size * sum(sizes[unit.start : stop]) / max(1, sum(sizes)))
    reason = _no_text(schema, config.text_field)
    if reason:
        total = sum(group.num_rows for group in groups)
        report.add(file.name, reason, line=row + 1, rows=total, content=", ".join(schema.names))
        return
    names = [config.text_field]
    for field in (config.id_field, config.source_field, config.language_field):
        place = schema.get_field_index(field)
        if place >= 0 and field not in names and (_is_text(schema.field(place).type) or _is_integer(schema, place)):
            names.append(field)
    places = [i for i in range(len(parquet.schema)) if parquet.schema.column(i).path in names]
    check = _RowCheck(file, config, report)
    page_limit = _PAGE_DOCUMENTS * config.max_document_bytes
    for index, group in enumerate(groups, unit.start):
        page = done = 0
        if group.total_byte_size > page_limit:
            page = max(largest_page(stream, group.column(i)) for i in places)
        if page > page_limit:
            reason = f"the row group has a page of more than {_PAGE_DOCUMENTS} * max_document_bytes"
            report.add(file.name, reason, line=row + 1, rows=group.num_rows, content=f"{page} bytes")
        else:
            average = group.total_byte_size / max(1, group.num_rows)
            batch_rows = max(1, min(65536, int(_BATCH_BYTES / max(1, average))))
            end: Exception | str = "it ends too early"
            try:
                for batch in parquet.iter_batches(batch_rows, row_groups=[index], columns=names, use_threads=False):
                    _add_batch(batch, row + done, check)
                    done += batch.num_rows
                    yield check.take()
            except (OSError, pa.ArrowException) as error:
                end = error
            if done < group.num_rows:
                reason = "the rest of the row group cannot be read"
                left = group.num_rows - done
                report.add(file.name, reason, line=row + done + 1, rows=left, content=end)
        row += group.num_rows


def _no_text(schema: Any, field: str) -> str:
    """Why a schema has no texts, or ""."""
    place = schema.get_field_index(field)
    if place < 0:
        return f"the file has no single column {field!r}"
    kind = schema.field(place).type
    return "" if _is_text(kind) else f"column {field!r} is {kind}, not a string"


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(value) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_integer(schema: Any, place: int) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(schema.field(place).type)


def _add_batch(batch: Any, first_row: int, check: _RowCheck) -> None:
    """Cells are decoded here: pyarrow does not check that they are UTF-8, and one bad cell must not cost the batch."""
    import pyarrow as pa

    columns = []
    for name in batch.schema.names:
        column = batch.column(name)
        columns.append(column if pa.types.is_integer(column.type) else _as_bytes(column))
    values = [column.to_pylist() for column in columns]
    for number, cells in enumerate(zip(*values, strict=True), first_row + 1):
        fields = dict(zip(batch.schema.names, cells, strict=True))
        bad = None
        for name, cell in fields.items():
            if isinstance(cell, bytes):
                try:
                    fields[name] = cell.decode()
                except UnicodeDecodeError:
                    bad = name
        if bad is None:
            check.add(fields, f"@{number}", number, -1)
        else:
            reason = f"field {bad!r} is not UTF-8"
            check.report.add(check.file.name, reason, line=number, content=fields[bad][:256])


def _as_bytes(column: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string(), safe=False)
    return column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary(), safe=False)
