"""How large the pages of a parquet column are, from their headers alone.

A page is decompressed whole, so a cell of one gigabyte costs several; the footer tells the sizes of columns only. Page
headers are Thrift structs in the compact protocol (apache/parquet-format, parquet.thrift: in PageHeader field 2 is
uncompressed_page_size and field 3 compressed_page_size).
"""

from __future__ import annotations

from typing import IO, Any

# A header holds statistics of up to a few KiB.
_HEADER_BYTES = 32 << 10
_UNCOMPRESSED, _COMPRESSED = 2, 3


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
