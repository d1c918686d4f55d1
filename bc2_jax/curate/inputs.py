"""Raw files -> units of work: byte ranges of JSON lines, row groups of parquet, batches of text files."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

from bc2_jax.validation import require, require_positive

Kind = Literal["jsonl", "parquet", "text"]
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip
_COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
LEGAL = ".jsonl, .ndjson or .json (one object a line) and .txt, each plain, .zst or .gz, and .parquet"
# A unit of text files holds at most so many, however small they are.
_FILES_PER_UNIT = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How raw files are read."""

    text_field: str = "text"
    """Field or column that holds the text of a document."""
    id_field: str = "id"
    """Field or column that names a document: a string or an integer. Where there is none, FILE@BYTE (the byte where
    the line begins, decompressed) for JSON lines, FILE@ROW for parquet, FILE for a text file."""
    source_field: str = "source"
    """Field or column that says where a document comes from. Where there is none, the file's name without its suffix
    and its shard number, or its folder's if that leaves nothing and for text files."""
    language_field: str = "language"
    """Field or column that gives a document's language; believed if it is `code` or a language code."""
    unit_bytes: int = 32 << 20
    """Bytes of raw files that one unit reads. A compressed file is always one unit."""
    shard_bytes: int = 24 << 20
    """Text bytes of the shards a unit is written in."""
    max_document_bytes: int = 16 << 20
    """Longest text, in UTF-8 bytes. A JSON line may have 2.5 times as many (escapes, other fields). What is longer is
    reported and skipped in small pieces, so it takes no memory."""

    def __post_init__(self) -> None:
        require_positive(self, "read.", "unit_bytes", "shard_bytes", "max_document_bytes")
        for field in ("text_field", "id_field", "source_field", "language_field"):
            require(bool(getattr(self, field)), f"read.{field}", getattr(self, field), "it must name a field")

    @property
    def max_line_bytes(self) -> int:
        return self.max_document_bytes * 5 // 2


class InputFile(NamedTuple):
    """One raw file."""

    path: str
    """Where it is: a local path or a URI."""
    name: str
    """What documents and reports call it: relative to the input that led to it, printable."""
    kind: Kind
    compression: str | None
    """zstd, gzip or None."""
    size: int
    """Bytes, as stored."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is read at one time, in one process."""

    index: int
    files: tuple[InputFile, ...]
    """One, but for text files."""
    start: int
    """First byte (JSON lines) or row group (parquet)."""
    stop: int
    """One past the last. A line belongs to the range in which it begins."""


class Inputs(NamedTuple):
    """What there is to read."""

    files: list[InputFile]
    skipped: list[str]
    """Files in the given folders that are of no legal kind, or hidden (name with a leading dot or underscore)."""


def find_inputs(paths: Sequence[str]) -> Inputs:
    """The raw files among and below paths: in the order given, those of a folder sorted by name.

    Raises ValueError for a path that does not exist, holds nothing to read, or is of no legal kind, and for a file
    that is named twice.
    """
    require(len(paths) > 0, "paths", list(paths), "at least one file or folder is needed")
    found: list[InputFile] = []
    skipped: list[str] = []
    for given in paths:
        before = len(found)
        for path, relative, size in _walk(os.fspath(given)):
            kind = _kind(path)
            hidden = relative and any(part[:1] in "._" for part in relative.split("/"))
            if kind is not None and not hidden:
                found.append(InputFile(path, relative or _base(path), *kind, size))
            else:
                require(bool(relative), "paths", path, f"files must be {LEGAL}")
                skipped.append(_printable(path))
        require(len(found) > before, "paths", given, f"the folder holds nothing to read: files must be {LEGAL}")
    real = collections.Counter(os.path.realpath(f.path) if "://" not in f.path else f.path for f in found)
    twice = [path for path, count in real.items() if count > 1]
    require(not twice, "paths", list(paths), f"{twice[0] if twice else ''} is named more than once")
    names = collections.Counter(f.name for f in found)
    # Ids are made of names, so where two inputs hold the same name the whole path stands for it.
    named = [f._replace(name=_printable(f.name if names[f.name] == 1 else f.path)) for f in found]
    return Inputs(named, skipped)


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _printable(name: str) -> str:
    """A file name that is not UTF-8 is shown with its bytes escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _kind(path: str) -> tuple[Kind, str | None] | None:
    stem, suffix = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = _SUFFIXES.get(suffix)
    if kind is None or (compression and kind == "parquet"):
        return None
    return kind, compression


def _walk(given: str) -> Iterator[tuple[str, str, int]]:
    """(path, path relative to given or "" if given is the file, size)."""
    if "://" in given:
        yield from _walk_store(given)
        return
    require(os.path.exists(given), "paths", given, "there is no such file or folder")
    if not os.path.isdir(given):
        yield given, "", os.path.getsize(given)
        return
    entries = []
    seen = set()
    for folder, folders, names in os.walk(given, followlinks=True):
        seen.add(os.path.realpath(folder))
        # A link to a folder above would be walked without end.
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(folder, f)) not in seen]
        for name in names:
            path = os.path.join(folder, name)
            # A broken link has no size; reading it says what is wrong.
            entries.append((os.path.relpath(path, given), path, os.path.getsize(path) if os.path.exists(path) else 0))
    for relative, path, size in sorted(entries, key=lambda entry: os.fsencode(entry[0])):
        yield path, relative, size


def _walk_store(given: str) -> Iterator[tuple[str, str, int]]:
    from pyarrow import fs

    system, root = fs.FileSystem.from_uri(given)
    info = system.get_file_info(root)
    require(info.type != fs.FileType.NotFound, "paths", given, "there is no such file or folder")
    scheme = given.split("://", 1)[0] + "://"
    if info.type == fs.FileType.File:
        yield given, "", info.size
        return
    below = [f for f in system.get_file_info(fs.FileSelector(root, recursive=True)) if f.type == fs.FileType.File]
    for file in sorted(below, key=lambda f: f.path):
        yield scheme + file.path, file.path[len(root.rstrip("/")) + 1 :], file.size


def modified(file: InputFile) -> int:
    """When a raw file was last written, in nanoseconds; 0 if that is not known."""
    if "://" not in file.path:
        return os.stat(file.path).st_mtime_ns if os.path.exists(file.path) else 0
    system, inside = _store(file.path)
    return system.get_file_info(inside).mtime_ns or 0


def _store(path: str) -> tuple[Any, str]:
    """The object store of a path that begins with a scheme, and the path in it: bytes, of which nothing is decoded."""
    from pyarrow import fs

    scheme, inside = path.split("://", 1)
    return fs.FileSystem.from_uri(f"{scheme}://{inside.split('/', 1)[0]}")[0], inside


def open_input(path: str) -> IO[bytes] | Any:
    """A seekable binary file. Raises OSError."""
    if "://" not in path:
        return open(path, "rb", buffering=0)
    system, inside = _store(path)
    return system.open_input_file(inside)


def default_source(file: InputFile) -> str:
    """web/zh-00001-of-00010.jsonl.zst -> zh; web/0001.parquet and web/page.txt -> web."""
    parts = file.name.rstrip("/").split("/")
    stem = parts[-1]
    while os.path.splitext(stem)[1].lower() in (*_SUFFIXES, *_COMPRESSIONS):
        stem = os.path.splitext(stem)[0]
    stem = re.sub(r"(?:^|[-_.])(?:part|shard|chunk|train)?[-_.]?\d+(?:[-_.]of[-_.]\d+)?$", "", stem)
    folder = _base(os.path.dirname(file.path))
    if file.kind == "text" or not stem:
        return _printable(parts[-2] if len(parts) > 1 else folder or "text")
    return stem


def plan_units(files: Sequence[InputFile], config: ReadConfig) -> list[Unit]:
    """Units in the order of files. Reads nothing but the footers of parquet files."""
    units: list[Unit] = []
    texts: list[InputFile] = []

    def add(files: Sequence[InputFile], start: int, stop: int) -> None:
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
        elif file.compression or not file.size:
            add([file], 0, file.size)
        else:
            for start in range(0, file.size, config.unit_bytes):
                add([file], start, min(start + config.unit_bytes, file.size))
    flush()
    return units


def _row_groups(file: InputFile, unit_bytes: int) -> list[tuple[int, int]]:
    """Ranges of row groups of about unit_bytes each. A footer that cannot be read gives one range, whose reading will
    say what is wrong."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_input(file.path) as stream:
            metadata = pq.read_metadata(stream)
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (OSError, pa.ArrowException):
        return [(0, 0)]
    ranges = []
    start = size = 0
    for index, bytes_of_group in enumerate(sizes):
        if index > start and size + bytes_of_group > unit_bytes:
            ranges.append((start, index))
            start, size = index, 0
        size += bytes_of_group
    return [*ranges, (start, len(sizes))]
