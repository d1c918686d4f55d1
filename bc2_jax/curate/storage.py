"""Folders on a disk or in an object store; a file appears when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from bc2_jax.files import lock
from bc2_jax.validation import require

# Columns stored with a dictionary, and columns with statistics, by which rows are selected.
_REPEATED = ("source", "language", "stage", "reason")
_SEARCHED = ("doc", "hash", "key", "span")
# Characters that Daft's path patterns treat specially; a backslash escapes them.
_PATTERN = re.compile(r"([\\*?\[\]{}!])")
# Temporary names of files that are being written.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")
# Characters that pyarrow does not read as part of a name in a URI.
_URI_SYNTAX = re.compile("[?#%]")


class Folder:
    """A folder by its path or by a URI that pyarrow knows: file://, gs://, s3://.

    Raises ValueError for a path that is not UTF-8, because Daft takes only text, and for a URI of an object store with
    ?, # or %, which programs read differently.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)
        if "://" in self.location:
            self._files, self._path = FileSystem.from_uri(self.location)
        else:
            self._files, self._path = LocalFileSystem(), str(Path(self.location).absolute())
        if isinstance(self._files, LocalFileSystem):
            self.location = self._path
        else:
            syntax = _URI_SYNTAX.search(self.location)
            require(syntax is None, "folder", location, "a URI must have no ?, # or %")
        legal = "the path of a folder that is read and written must be UTF-8, without zero bytes"
        require(_is_text(self.location) and "\0" not in self.location, "folder", location, legal)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.location.rstrip('/')}/{name}")

    def pattern(self, suffix: str) -> str:
        """The path pattern that Daft reads as all files of this folder whose names end with `suffix`.

        Daft reads every path as a pattern: without escapes it takes `run[1]` for the folder `run1`.
        """
        folder = _PATTERN.sub(r"\\\1", self.location.rstrip("/"))
        return f"{folder}/*{suffix}"

    def owned(self, field: str) -> AbstractContextManager[object]:
        """Holds `files.lock` on the folder until the block ends; does nothing in an object store."""
        if not isinstance(self._files, LocalFileSystem):
            return contextlib.nullcontext()
        return lock(Path(self._path) / ".lock", f"{field} = {self.location!r}")

    def names(self, suffix: str = "") -> list[str]:
        """Sorted names of the files that end with `suffix`, without hidden ones; [] for a missing folder."""
        names = [info.base_name for info in self._infos() if info.type == FileType.File]
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))

    def entries(self) -> list[str]:
        """Sorted names of the files and folders, without hidden ones; [] for a missing folder."""
        return sorted(info.base_name for info in self._infos() if not info.base_name.startswith("."))

    def exists(self, name: str) -> bool:
        return self._files.get_file_info(f"{self._path}/{name}").type == FileType.File

    def remove(self) -> None:
        """Removes the folder and its contents, if it exists."""
        if self._files.get_file_info(self._path).type == FileType.Directory:
            self._files.delete_dir(self._path)

    def remove_unfinished(self) -> None:
        """Removes temporary files of a process that was killed; no process may be writing here."""
        for info in self._infos():
            if _UNFINISHED.fullmatch(info.base_name) and info.type == FileType.File:
                self._files.delete_file(info.path)

    def delete(self, name: str) -> None:
        """Removes a file, if it exists."""
        if self.exists(name):
            self._files.delete_file(f"{self._path}/{name}")

    def write(self, name: str, content: bytes) -> None:
        with self._replacing(name) as path, self._files.open_output_stream(path, compression=None) as file:
            file.write(content)

    def read(self, name: str) -> bytes:
        with self._files.open_input_stream(f"{self._path}/{name}", compression=None) as file:
            return file.read()

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_table(self, name: str, table: pa.Table, compression: str = "lz4", rows: int | None = None) -> None:
        """Writes a parquet file with row groups of `rows` rows."""
        # Row groups of documents are small, so that a few documents can be read without the rest.
        rows = rows or (512 if "text" in table.column_names else 1 << 16)
        with self._replacing(name) as path, self._files.open_output_stream(path, compression=None) as file:
            pq.write_table(
                table, file, compression=compression, row_group_size=rows, write_page_checksum=True,
                use_dictionary=[name for name in table.column_names if name in _REPEATED],
                write_statistics=[name for name in table.column_names if name in _SEARCHED],
            )  # fmt: skip

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(f"{self._path}/{name}", filesystem=self._files, columns=columns, pre_buffer=False)

    def rows(self, name: str = "") -> int:
        """Rows in the footer of a parquet file, or of all parquet files; 0 if a footer is damaged."""
        try:
            return sum(
                pq.read_metadata(f"{self._path}/{file}", filesystem=self._files).num_rows
                for file in ([name] if name else self.names(".parquet"))
            )
        except pa.ArrowInvalid:
            return 0

    def select(self, condition: ds.Expression | None, columns: list[str] | None = None) -> pa.Table:
        """The rows of all parquet files that satisfy `condition`; skips row groups by their statistics."""
        paths = [f"{self._path}/{name}" for name in self.names(".parquet")]
        files = ds.dataset(paths, filesystem=self._files, format="parquet")
        return files.to_table(columns=columns, filter=condition)

    def _infos(self) -> list[FileInfo]:
        return self._files.get_file_info(FileSelector(self._path, allow_not_found=True))

    def _replacing(self, name: str) -> _Replacement:
        self._files.create_dir(self._path, recursive=True)
        return _Replacement(self._files, f"{self._path}/{name}")


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Replacement:
    """Gives the path to write to: on a disk a temporary file that is renamed at the end of the block."""

    def __init__(self, files: FileSystem, path: str) -> None:
        self._files, self._path = files, path
        # An object store can't rename, and shows an object only when it is complete.
        self._written = path
        if isinstance(files, LocalFileSystem):
            folder, name = os.path.split(path)
            self._written = f"{folder}/.{name}.{uuid.uuid4().hex}"

    def __enter__(self) -> str:
        return self._written

    def __exit__(self, kind: object, *_: object) -> None:
        if self._written == self._path:
            return
        if kind is None:
            self._files.move(self._written, self._path)
        elif self._files.get_file_info(self._written).type == FileType.File:
            self._files.delete_file(self._written)
