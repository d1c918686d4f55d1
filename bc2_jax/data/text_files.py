"""Finding the text files among paths and in folders, on disks and in object stores.

    .jsonl, .ndjson, .json    a line is a document, a JSON object
    .txt                      a file is a document
    .parquet                  a row is a document

The first two may be .zst or .gz. A folder stands for all such files below it, through links to folders too; a folder
that curation wrote, for its documents. Files that are not read are listed in `skipped`.
"""

from __future__ import annotations

import collections
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

from bc2_jax.validation import require

Kind = Literal["jsonl", "parquet", "text"]
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip
COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
LEGAL = ".jsonl, .ndjson or .json (one object a line) and .txt, each plain, .zst or .gz, and .parquet"
_SPECIAL = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# How to recognise a folder that curation writes: its stages, and the names of its files.
_SHARD = re.compile(r"\d{6}-\d{4}\.parquet")
_STAGES = ("read", "exact", "filter", "near", "contamination", "dense", "spans", "write")


class TextFile(NamedTuple):
    """One file of text."""

    path: str
    """Local path or URI."""
    name: str
    """Printable name for ids and reports: the path relative to the input."""
    kind: Kind
    compression: str | None
    """zstd, gzip or None."""
    size: int
    """Bytes, as stored."""


class TextFiles(NamedTuple):
    """Files to read, and files that are skipped."""

    files: list[TextFile]
    skipped: list[str]
    """In the folders: files of other kinds, hidden ones (a leading dot or underscore), devices, FIFOs and sockets, and
    links to folders that are read anyway; with the reason if the name does not tell it."""


class _Found(NamedTuple):
    path: str
    relative: str
    """Path below the input; "" for the input itself."""
    size: int
    problem: str = ""
    """Why it is skipped."""


def find_text_files(
    paths: Sequence[str | os.PathLike[str]],
    field: str = "paths",
    kinds: Collection[Kind] = ("jsonl", "parquet", "text"),
    legal: str = LEGAL,
) -> TextFiles:
    """The files of `kinds` among and below `paths`, in the order given, those of a folder sorted by name.

    `legal` describes these files in errors. Raises ValueError, naming `field`, for a path that does not exist, has
    nothing to read or is of another kind, a file that is named twice, and a curated folder that is unfinished or has
    lost files; OSError for a folder that cannot be listed.
    """
    require(len(paths) > 0, field, list(paths), "at least one file or folder is needed")
    found: list[TextFile] = []
    skipped: list[str] = []
    for given in [os.fspath(path) for path in paths]:
        before = len(found)
        for path, relative, size, problem in _walk(given, field):
            kind = kind_of(path)
            hidden = relative and any(part[:1] in "._" for part in relative.split("/"))
            if kind is not None and kind[0] in kinds and not hidden and not problem:
                found.append(TextFile(path, relative or _base(path), *kind, size))
            else:
                require(bool(relative), field, path, problem or f"files must be {legal}")
                skipped.append(printable(path) + (f" ({problem})" if problem else ""))
        require(len(found) > before, field, given, f"the folder holds nothing to read: files must be {legal}")
    real = collections.Counter(os.path.realpath(f.path) if "://" not in f.path else f.path for f in found)
    twice = [path for path, count in real.items() if count > 1]
    require(not twice, field, [os.fspath(path) for path in paths], f"{''.join(twice[:1])} is named more than once")
    names = collections.Counter(f.name for f in found)
    # Names become ids, so files of equal name in two inputs get their whole paths as names.
    named = [f._replace(name=printable(f.name if names[f.name] == 1 else f.path)) for f in found]
    return TextFiles(named, skipped)


def kind_of(path: str) -> tuple[Kind, str | None] | None:
    """(kind, compression) of a file by its name; None for other files."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = SUFFIXES.get(suffix)
    if kind is None or (compression and kind == "parquet"):
        return None
    return kind, compression


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


# ---------------------------------------------------------------------------------------------------------------- disks


def _walk(given: str, field: str) -> Iterator[_Found]:
    if "://" in given:
        system, inside = open_store(given)
        if system is not None:
            yield from _walk_store(system, given, inside, field)
            return
        given = inside
    require(os.path.exists(given), field, given, "there is no such file or folder")
    if not os.path.isdir(given):
        status = os.stat(given)
        yield _Found(given, "", status.st_size, _special(status.st_mode))
        return
    folder = os.path.dirname(os.path.abspath(given))
    if os.path.basename(os.path.abspath(given)) in ("documents", "jsonl") and _is_curated(folder):
        _check_curated(folder, field)
    entries: list[_Found] = []
    seen = {os.path.realpath(given): given}

    def fail(error: OSError) -> None:
        raise OSError(f"{field} = {given!r} is not valid: {error.filename!r} can't be listed ({error.strerror}).")

    for folder, folders, names in os.walk(given, followlinks=True, onerror=fail):
        if _is_curated(folder):
            _check_curated(folder, field)
            folders[:], names = ["documents"], []
        for name in sorted(folders, key=os.fsencode):
            path = os.path.join(folder, name)
            # A link to a folder above would never end.
            if (before := seen.setdefault(os.path.realpath(path), path)) != path:
                folders.remove(name)
                entries.append(_Found(path, os.path.relpath(path, given), 0, f"it is {before}, which is read"))
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.stat(path)
            except OSError:  # a broken link, to be reported when it is read
                entries.append(_Found(path, os.path.relpath(path, given), 0))
            else:
                entries.append(_Found(path, os.path.relpath(path, given), status.st_size, _special(status.st_mode)))
    yield from sorted(entries, key=lambda entry: os.fsencode(entry.relative))


def _special(mode: int) -> str:
    """Why it is skipped: opening a FIFO would block for ever."""
    kind = _SPECIAL.get(stat.S_IFMT(mode))
    return f"it is {kind}, not a file" if kind else ""


def _is_curated(folder: str) -> bool:
    """Whether a curation writes or wrote to a folder."""
    if any(os.path.isfile(os.path.join(folder, "work", stage, "begun.json")) for stage in _STAGES):
        return True
    results = (os.path.join(folder, name) for name in ("documents", "removed"))
    return any(os.path.isdir(path) and any(map(_SHARD.fullmatch, os.listdir(path))) for path in results)


def _check_curated(folder: str, field: str) -> None:
    """Raises ValueError if the curation of a folder is unfinished or some of its documents are missing."""
    report = os.path.join(folder, "report.json")
    legal = (
        "it is the folder of a curation that is not finished (it has no report.json); run tools/curate.py to its end"
    )
    require(os.path.isfile(report), field, folder, legal)
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = os.path.join(folder, "documents")
    found = 0
    try:
        with open(report, encoding="utf-8") as file:
            written = int(json.load(file)["written"]["documents"])
        names = os.listdir(documents) if os.path.isdir(documents) else []
        for name in sorted(name for name in names if name.endswith(".parquet") and not name.startswith(".")):
            found += pq.read_metadata(os.path.join(documents, name)).num_rows
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{field} = {folder!r} is not valid: the curation's files are damaged ({error}).") from error
    legal = f"its report counts {written} documents and documents/ has {found}; run tools/curate.py again"
    require(found == written, field, folder, legal)
    legal = "the curation kept no document; its report.md lists what was removed"
    require(written > 0, field, folder, legal)


# --------------------------------------------------------------------------------------------------------------- stores


def open_store(uri: str) -> tuple[Any, str]:
    """(object store, path in it) of a URI; (None, path) for file://."""
    from pyarrow import fs

    if uri.startswith("file://"):
        return None, fs.FileSystem.from_uri(uri)[1]
    scheme, inside = uri.split("://", 1)
    # Only the bucket is parsed as a URI: names of objects are bytes, in which nothing is decoded.
    return fs.FileSystem.from_uri(f"{scheme}://{inside.split('/', 1)[0]}")[0], inside


def _walk_store(system: Any, given: str, root: str, field: str) -> Iterator[_Found]:
    from pyarrow import fs

    info = system.get_file_info(root)
    require(info.type != fs.FileType.NotFound, field, given, "there is no such file or folder")
    scheme = given.split("://", 1)[0] + "://"
    if info.type == fs.FileType.File:
        yield _Found(given, "", info.size)
        return
    below = [f for f in system.get_file_info(fs.FileSelector(root, recursive=True)) if f.type == fs.FileType.File]
    for file in sorted(below, key=lambda f: f.path):
        yield _Found(scheme + file.path, file.path[len(root.rstrip("/")) + 1 :], file.size)


def open_binary(path: str) -> IO[bytes] | Any:
    """A seekable binary file by its path or URI. Raises OSError."""
    if "://" not in path:
        return open(path, "rb", buffering=0)
    system, inside = open_store(path)
    return open(inside, "rb", buffering=0) if system is None else system.open_input_file(inside)


def modified(path: str) -> int:
    """Time of the last change of a file in nanoseconds; 0 if unknown."""
    system, inside = open_store(path) if "://" in path else (None, path)
    if system is None:
        return os.stat(inside).st_mtime_ns if os.path.exists(inside) else 0
    return system.get_file_info(inside).mtime_ns or 0
