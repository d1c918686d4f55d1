"""Rows of Parquet files, in bounded memory: row groups, and the sizes of pages from their headers alone.

A page is decompressed whole, so a cell of one gigabyte costs several; the footer has only the sizes of columns. Page
headers are Thrift structs in the compact protocol (apache/parquet-format, parquet.thrift: in PageHeader field 2 is
uncompressed_page_size and field 3 compressed_page_size).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from bc2_jax.data.records import Invalid, Record, undecodable

_BATCH_BYTES = 4 << 20
# A header holds statistics of up to a few KiB.
_HEADER_BYTES = 32 << 10
_UNCOMPRESSED, _COMPRESSED = 2, 3


def read_table(file: Any, name: str) -> Iterator[Record | Invalid]:
    """All rows of an open file."""
    parquet = open_parquet(file, name)
    if isinstance(parquet, Invalid):
        yield parquet
        return
    first = 1
    for group in range(parquet.metadata.num_row_groups):
        for batch in read_row_group(parquet, file, group, first, name):
            yield from batch
        first += parquet.metadata.row_group(group).num_rows


def open_parquet(file: Any, name: str) -> Any:
    """An open file as pyarrow's ParquetFile, which checks the pages that it reads; Invalid for a damaged footer."""
    parquet, pyarrow = import_arrow("pyarrow.parquet"), import_arrow("pyarrow")
    try:
        return parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        reason = "the file is not a complete Parquet file"
        return Invalid(reason, name, 0, _first_line(error), content=error)


def why_no_texts(schema: Any, column: str) -> str:
    """Why a file of this Arrow schema has no texts in `column`, or ""."""
    place = schema.get_field_index(column)
    if place < 0:
        return f"the file has no single column {column!r}"
    kind = schema.field(place).type
    return "" if is_text(kind) else f"column {column!r} is {kind}, not a string"


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is a string, in a dictionary or not."""
    types = import_arrow("pyarrow").types
    value = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)


def read_row_group(
    parquet: Any, file: Any, group: int, first: int, name: str, *, columns: Sequence[str] | None = None,
    most_rows: int = 64, page_limit: int = 0, limit_name: str = "",
) -> Iterator[list[Record | Invalid]]:  # fmt: skip
    """The rows of a row group of `file`, opened as `parquet`, as objects, in batches of a few MiB.

    `first` numbers the group's first row. Damage ends the group; of the batch in which it is, nothing is read. With
    `page_limit` a group with a larger page is invalid: a page is in memory whole, several times.
    """
    pyarrow = import_arrow("pyarrow")
    info, schema = parquet.metadata.row_group(group), parquet.schema_arrow
    names = [column for column in schema.names if columns is None or column in columns]
    page = 0
    # ColumnChunkMetaData is asked only where it must be: pyarrow 25 aborts the process for some that are corrupt.
    if page_limit and info.total_byte_size > page_limit:
        places = [i for i in range(len(parquet.schema)) if parquet.schema.column(i).path in names]
        page = max((largest_page(file, info.column(i)) for i in places), default=0)
    if page > page_limit:
        reason = f"the row group has a page of more than {limit_name or f'{page_limit} bytes'}"
        yield [Invalid(reason, f"{name}:{first}", info.num_rows, line=first, content=f"{page} bytes")]
        return
    batch_rows = max(1, min(most_rows, int(_BATCH_BYTES * info.num_rows / max(1, info.total_byte_size))))
    done = 0
    end: Exception | str = "it ends too early"
    try:
        for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=names, use_threads=False):
            yield _records(batch, first + done, name)
            done += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        end = error
    if done < info.num_rows:
        detail = f"rows {first + done}-{first + info.num_rows - 1}: {_first_line(end)}"
        reason, line = "the rest of the row group cannot be read", first + done
        yield [Invalid(reason, f"{name}:{line}", info.num_rows - done, detail, line, content=end)]


def _records(batch: Any, first: int, name: str) -> list[Record | Invalid]:
    names = batch.schema.names
    found: list[Record | Invalid] = []
    for row, cells in enumerate(zip(*map(_cells, batch.columns), strict=True), first):
        where = f"{name}:{row}"
        bad = next((i for i, cell in enumerate(cells) if isinstance(cell, UnicodeDecodeError)), None)
        if bad is None:
            found.append(Record(dict(zip(names, cells, strict=True)), where, row))
        else:
            found.append(undecodable(f"field {names[bad]!r} is not UTF-8", where, cells[bad], line=row))
    return found


def _cells(column: Any) -> list[Any]:
    """The values of a column, with a UnicodeDecodeError for text that is not UTF-8, which Arrow does not check."""
    pyarrow = import_arrow("pyarrow")
    if not is_text(column.type):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            return [_decoded(cell.as_py) for cell in column]
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type):
        column = column.cast(pyarrow.large_string(), safe=False)
    is_large = pyarrow.types.is_large_string(column.type)
    cells = column.cast(pyarrow.large_binary() if is_large else pyarrow.binary(), safe=False).to_pylist()
    return [None if cell is None else _decoded(cell.decode) for cell in cells]


def _decoded(decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except UnicodeDecodeError as error:
        return error


def _first_line(error: object) -> str:
    """Of a message, without its full stop."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def import_arrow(module: str) -> Any:
    """pyarrow or a module of it. Raises ValueError, naming the extra, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ValueError(f".parquet files need {name}: pip install 'bc2_jax[data]'.") from error


# ---------------------------------------------------------------------------------------------------------------- pages


def largest_page(stream: IO[bytes] | Any, column: Any) -> int:
    """Bytes of the largest page, decompressed, of a pyarrow ColumnChunkMetaData, as far as its headers can be read.
    Raises OSError."""
    offsets = (column.dictionary_page_offset, column.data_page_offset)
    position = min(offset for offset in offsets if offset)
    end = position + column.total_compressed_size
    largest = 0
    while position < end:
        stream.seek(position)
        header = _Compact(stream.read(_HEADER_BYTES))
        try:
            fields = header.struct()
            largest = max(largest, fields[_UNCOMPRESSED])
            length = fields[_COMPRESSED]
        except (LookupError, ValueError):
            # Corrupt: reading the pages says so.
            break
        if length < 0:
            break
        position += header.place + length
    return largest


class _Compact:
    """Reads Thrift's compact protocol. Raises IndexError at the end of data, ValueError for an unknown type."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Field id -> value of the integer fields."""
        if depth > 16:
            raise ValueError("nested too deeply")
        fields: dict[int, int] = {}
        number = 0
        while (header := self.byte()) != 0:
            number = number + (header >> 4) if header >> 4 else self._integer()
            if header & 15 in (4, 5, 6):
                fields[number] = self._integer()
            elif header & 15 not in (1, 2):
                self._skip(header & 15, depth)
        return fields

    def _integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (1, 2, 3):
            self.place += 1
        elif kind in (4, 5, 6):
            self.varint()
        elif kind == 7:
            self.place += 8
        elif kind == 8:
            length = self.varint()
            self.place += length
        elif kind == 12:
            self.struct(depth + 1)
        else:
            # Page headers hold no lists, sets or maps.
            raise ValueError(f"type {kind}")
