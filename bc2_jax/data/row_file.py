"""Files of packed rows: writing them, and reading them with checksums, so that damage never becomes training data.

A file is an ArrayRecord of rows, T + 1 little-endian uint32 each, uncompressed, and a last record with the CRC-32 of
each row, little-endian uint32, whose own CRC-32 is in the manifest. ArrayRecord's hashes find flipped bits, but not a
file, or a part of one, in the place of another.

A row of text is token ids. In a row of conversations the highest bits of a token are the flags TARGET, START and
BRANCH; samples follow one another from the row's first token, then padding. A sample with branches is a shared
beginning, its trunk, stored once, followed by several continuations, such as a prompt followed by the chosen and the
rejected answer; the trunk may be empty.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import logging
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax.files import file_sha256

logger = logging.getLogger(__name__)

# One record a group, so that a row is read without its neighbours; uncompressed, since token ids hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0"
_BUFFER_BYTES = 32_768

TARGET = np.uint32(1 << 31)
"""The token is a target: of an answer, the user's role after one (as eos), or a sample's eos."""
START = np.uint32(1 << 30)
"""A sample begins here. The first token of every row of conversations has it, no token of a row of text."""
BRANCH = np.uint32(1 << 29)
"""A branch of the sample begins here. It is not a TARGET: it does not follow the token before it."""


def token_ids(rows: np.ndarray) -> np.ndarray:
    """Tokens of either kind of row without flags, uint32 of any shape."""
    return rows & (BRANCH - np.uint32(1))


def find_branches(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token's branch in rows of conversations [rows, T], 0 for the trunk, and the number of tokens between that
    branch and its trunk; both int32 [rows, T]."""
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
    """The manifest's description of a file."""

    name: str
    rows: int
    size: int
    """Bytes of the file."""
    sha256: str
    rows_crc32: int | None = None
    """CRC-32 of the record of checksums; None in files written without one."""


class BadRow(ValueError):
    """An unreadable row; the message names its file, its number there and the reason."""

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
        """Rows written so far."""
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
    """Writes the rows of one split, `rows_per_file` in each file."""

    def __init__(self, folder: str | os.PathLike[str], split: str, rows_per_file: int) -> None:
        self._folder, self._split, self._rows_per_file = Path(folder), split, rows_per_file
        self._closed: list[tuple[int, int]] = []
        """Rows and `FileInfo.rows_crc32` of each complete file."""
        self._writer: RowFileWriter | None = None

    def write(self, row: np.ndarray) -> None:
        """Appends a row, uint32 [T + 1]."""
        if self._writer is not None and self._writer.rows == self._rows_per_file:
            self._close_file()
        if self._writer is None:
            self._writer = RowFileWriter(self._file(len(self._closed)))
        self._writer.write(row)

    def close(self) -> tuple[FileInfo, ...]:
        """Ends the last file and renames all of them to NUMBER-of-COUNT."""
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
    """Reads one file, opened at first use; safe for several threads."""

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
            with contextlib.suppress(Exception):  # any fault was raised when the row was read
                self._opened[0].close()
            self._opened = None

    def open(self) -> tuple[Any, np.ndarray | None]:
        """Opens the file if it is not open. Raises ValueError with the reason if it is not the packed one."""
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
        """The rows start .. stop - 1, much faster than one by one if they are short. Raises BadRow."""
        try:
            reader, checksums = self._opened or self.open()
            records = reader.read(start, stop)
        except Exception:  # of any kind: it comes from C++
            records = []
        if len(records) != stop - start:  # find the bad row
            return [self.read(row) for row in range(start, stop)]
        return [self._checked(row, record, checksums) for row, record in enumerate(records, start)]

    def _checked(self, row: int, record: bytes, checksums: np.ndarray | None) -> bytes:
        # Beyond the end of a truncated file ArrayRecord returns nothing, without an error.
        if len(record) != self._row_bytes:
            raise BadRow(self.path, row, f"it has {len(record)} bytes, not {self._row_bytes}")
        if checksums is not None and zlib.crc32(record) != checksums[row]:
            raise BadRow(self.path, row, f"its CRC-32 is {zlib.crc32(record):08x}, not {checksums[row]:08x}")
        return record


class BadRows:
    """Counts this process's unreadable rows and logs each once.

    Safe for several threads: training rows are read ahead while validation rows are read.
    """

    def __init__(self, limit: int) -> None:
        """`limit` is data.max_bad_rows."""
        self._limit = limit
        self._seen: set[tuple[Path, int]] = set()
        self._lock = threading.Lock()

    def add(self, bad: BadRow) -> None:
        """Raises ValueError beyond the limit."""
        with self._lock:
            if (bad.path, bad.row) in self._seen:
                return
            if len(self._seen) >= self._limit:
                raise ValueError(
                    f"{bad.finding}: the file is damaged, was replaced or is out of reach, and data.max_bad_rows = "
                    f"{self._limit} allows no more."
                ) from bad
            self._seen.add((bad.path, bad.row))
            logger.warning(
                "%s: padding takes its place; bad row %d of at most data.max_bad_rows = %d.",
                bad.finding, len(self._seen), self._limit,
            )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """{"bad_rows": their number so far, those read ahead included}; {} for none."""
        return {"bad_rows": float(len(self._seen))} if self._seen else {}
