"""A file of packed rows: how it is written, and read so that no other tokens come back than those that were packed.

It is an ArrayRecord file whose records are the rows, T + 1 little-endian uint32 each, uncompressed, and at its end one
record with the CRC-32 of each row, little-endian uint32. The CRC-32 of that record stands in the manifest. The hashes
of ArrayRecord find flipped bits, but not a file, or a part of one, in the place of another.

A row of text is token ids. In a row of conversations the highest bits of a token are flags, TARGET, START and BRANCH:
its samples stand one after another, the first at the row's beginning, and padding follows the last. A sample with
branches is a shared beginning, its trunk, stored once and followed by several continuations of it, such as a prompt
followed by the chosen and the rejected answer; the trunk may be empty.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax.files import file_sha256

# One record a group, so that a row is read without its neighbours; uncompressed, since token ids hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"
_BUFFER_BYTES = 32_768

TARGET = np.uint32(1 << 31)
"""This token is a target: of an answer, the user's role after one (as eos), or the eos of a sample."""
START = np.uint32(1 << 30)
"""A sample begins with this token. The first token of every row of conversations has it, none of a row of text."""
BRANCH = np.uint32(1 << 29)
"""A branch of the sample begins with this token, which is not a TARGET: the token before it is not what it follows."""


def token_ids(rows: np.ndarray) -> np.ndarray:
    """The tokens of rows of either kind, uint32 of any shape, without flags."""
    return rows & (BRANCH - np.uint32(1))


def find_branches(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The branch that each token of rows of conversations [rows, T] is in, 0 for the trunk, and how many tokens stand
    between that branch and its trunk; both int32 [rows, T]."""
    starts, branches = (rows & START) > 0, (rows & BRANCH) > 0
    count = np.cumsum(branches, axis=-1, dtype=np.int32)
    branch = count - np.maximum.accumulate(np.where(starts, count - branches, 0), axis=-1)
    index = np.arange(rows.shape[-1], dtype=np.int32)
    begin, first = (
        np.maximum.accumulate(np.where(places, index, 0), axis=-1) for places in (branches, branches & (branch == 1))
    )
    return branch, np.where(branch > 0, begin - first, 0)


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """One file, as the manifest describes it."""

    name: str
    rows: int
    size: int
    """Bytes of the file."""
    sha256: str
    rows_crc32: int | None = None
    """CRC-32 of the record with those of the rows; None in files that were written without one."""


class BadRow(ValueError):
    """A row that can't be read; the message names its file, its number there and the reason."""

    def __init__(self, path: Path, row: int, reason: str) -> None:
        self.path, self.row = path, row
        self.finding = f"row {row} of {str(path)!r} can't be read ({reason})"
        super().__init__(f"{self.finding}: the file is damaged, was replaced or is out of reach.")


class RowFileWriter:
    """Writes one file, a row at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._checksums = array.array("I")

    @property
    def rows(self) -> int:
        """How many were written."""
        return len(self._checksums)

    def write(self, row: np.ndarray) -> None:
        """Appends a row, uint32 [T + 1]."""
        record = row.astype("<u4", copy=False).tobytes()
        self._writer.write(record)
        self._checksums.append(zlib.crc32(record))

    def close(self) -> int:
        """Ends the file; returns its `FileInfo.rows_crc32`."""
        checksums = np.array(self._checksums, "<u4").tobytes()
        self._writer.write(checksums)
        self._writer.close()
        return zlib.crc32(checksums)


class RowFilesWriter:
    """Writes the rows of one split, so many a file."""

    def __init__(self, folder: str | os.PathLike[str], split: str, rows_per_file: int) -> None:
        self._folder, self._split, self._rows_per_file = Path(folder), split, rows_per_file
        self._closed: list[tuple[int, int]] = []
        """Rows and `FileInfo.rows_crc32` of each file that is complete."""
        self._writer: RowFileWriter | None = None

    def write(self, row: np.ndarray) -> None:
        """Appends a row, uint32 [T + 1]."""
        if self._writer is not None and self._writer.rows == self._rows_per_file:
            self._close_file()
        if self._writer is None:
            self._writer = RowFileWriter(self._file(len(self._closed)))
        self._writer.write(row)

    def close(self) -> tuple[FileInfo, ...]:
        """Ends the last file and gives all their names, which say how many there are."""
        self._close_file()
        files = []
        for index, (rows, crc32) in enumerate(self._closed):
            name = f"{self._split}-{index:05d}-of-{len(self._closed):05d}.array_record"
            file = self._file(index).rename(self._folder / name)
            files.append(FileInfo(name, rows, file.stat().st_size, file_sha256(file), crc32))
        return tuple(files)

    def _file(self, index: int) -> Path:
        return self._folder / f"{self._split}-{index:05d}"

    def _close_file(self) -> None:
        if self._writer is not None:
            self._closed.append((self._writer.rows, self._writer.close()))
            self._writer = None


class RowFile:
    """Reads one file, which is opened when that is first needed; several threads may use it."""

    def __init__(self, folder: str | os.PathLike[str], info: FileInfo, sequence_length: int) -> None:
        self.path, self.rows = Path(folder, info.name), info.rows
        self._crc32, self._row_bytes = info.rows_crc32, 4 * (sequence_length + 1)
        self._lock = threading.Lock()
        self._opened: tuple[Any, np.ndarray | None] | None = None
        """The reader, and the CRC-32 of each row."""

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened is not None:
            with contextlib.suppress(Exception):  # what went wrong was said when it was read
                self._opened[0].close()
            self._opened = None

    def open(self) -> tuple[Any, np.ndarray | None]:
        """Opens the file if it is not open. Raises ValueError, with the reason alone, if it is not what was packed."""
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> tuple[Any, np.ndarray | None]:
        from array_record.python.array_record_module import ArrayRecordReader

        try:
            reader = ArrayRecordReader(str(self.path), _READER_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
            if not reader.ok():
                reader.close()  # raises what is wrong
                raise ValueError("unknown error")
        except Exception as error:  # of any kind: it comes from C++
            raise ValueError(f"it can't be opened: {error}") from error
        records, expected = reader.num_records(), self.rows + (self._crc32 is not None)
        if records != expected:
            raise ValueError(f"it has {records} records where its manifest says {expected}")
        if self._crc32 is None:
            return reader, None
        try:
            (checksums,) = reader.read([self.rows])
        except Exception as error:  # of any kind: it comes from C++
            raise ValueError(f"its checksums can't be read: {error}") from error
        if (found := zlib.crc32(checksums)) != self._crc32:
            raise ValueError(f"the CRC-32 of its checksums is {found:08x} where its manifest says {self._crc32:08x}")
        return reader, np.frombuffer(checksums, "<u4")

    def read(self, row: int) -> bytes:
        """A row as 4 * (T + 1) bytes. Raises BadRow."""
        try:
            reader, checksums = self._opened or self.open()
            (record,) = reader.read([row])
        except Exception as error:  # of any kind: it comes from C++
            raise BadRow(self.path, row, str(error)) from error
        return self._checked(row, record, checksums)

    def read_range(self, start: int, stop: int) -> list[bytes]:
        """The rows from `start` to `stop`; short ones come much faster than one by one. Raises BadRow."""
        try:
            reader, checksums = self._opened or self.open()
            records = reader.read(start, stop)
        except Exception:  # of any kind: it comes from C++
            records = []
        if len(records) != stop - start:  # which row is it?
            return [self.read(row) for row in range(start, stop)]
        return [self._checked(row, record, checksums) for row, record in enumerate(records, start)]

    def _checked(self, row: int, record: bytes, checksums: np.ndarray | None) -> bytes:
        # Of what lies behind the end of a file that has shrunk nothing comes, and no error.
        if len(record) != self._row_bytes:
            raise BadRow(self.path, row, f"it has {len(record)} bytes, not {self._row_bytes}")
        if checksums is not None and zlib.crc32(record) != checksums[row]:
            raise BadRow(self.path, row, f"its CRC-32 is {zlib.crc32(record):08x}, not {checksums[row]:08x}")
        return record
