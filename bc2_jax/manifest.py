"""The manifest of a checkpoint: `MANIFEST.json` lists the size and SHA-256 of every file.

It is written last, after everything is synced to disk, so a folder with a manifest is complete. Verification finds a
single flipped bit, which would not change any shape. Names in a manifest cannot point outside the folder.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bc2_jax.files import file_sha256, replaced, sync
from bc2_jax.validation import is_inside

MANIFEST_NAME = "MANIFEST.json"
_FORMAT = 1
_SHA256 = re.compile("[0-9a-f]{64}")
# hashlib releases the GIL while hashing. A save leaves half of the cores to training.
_CORES = os.cpu_count() or 1
_SAVE_THREADS, _VERIFY_THREADS = min(8, max(1, _CORES // 2)), min(32, _CORES)


class DamagedCheckpoint(ValueError):
    """A checkpoint is not as it was written; the message is one sentence that names the file."""


class FileState(NamedTuple):
    """Expected size and hash of a file."""

    size: int
    """Bytes."""
    sha256: str


def write_manifest(folder: Path) -> dict[str, FileState]:
    """Syncs every file below `folder` to disk, then writes the manifest; returns its contents.

    Raises OSError if a file cannot be read, and DamagedCheckpoint for anything but files and folders.
    """
    names = sorted(_walk(folder))
    with ThreadPoolExecutor(_SAVE_THREADS) as pool:
        files = dict(zip(names, pool.map(lambda name: _sync_and_describe(folder / name), names), strict=True))
    for root, _, _ in os.walk(folder):
        sync(Path(root))
    with replaced(folder / MANIFEST_NAME, durable=True) as partial:
        partial.write_text(json.dumps({"format": _FORMAT, "files": files}, indent=0), encoding="utf-8", newline="\n")
    return files


def read_manifest(folder: Path) -> dict[str, FileState]:
    """File name, relative to `folder` -> expected state.

    Raises DamagedCheckpoint for a missing or malformed manifest, or a name that points outside the folder.
    """
    path = folder / MANIFEST_NAME
    try:
        value = json.loads(_read_regular(path))
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{folder} has no {MANIFEST_NAME}: it is incomplete or was written by an older version."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: it is not JSON ({error}).") from None
    if not isinstance(value, dict) or value.get("format") != _FORMAT or not isinstance(value.get("files"), dict):
        raise DamagedCheckpoint(f"{path} is damaged: it is not a manifest of format {_FORMAT}.")
    files = {}
    for name, entry in value["files"].items():
        if not is_inside(name):
            raise DamagedCheckpoint(f"{path} is not valid: {name!r} is not the name of a file in the checkpoint.")
        if not _is_state(entry):
            raise DamagedCheckpoint(f"{path} is damaged: {name!r} has no size and SHA-256.")
        files[name] = FileState(*entry)
    if not files:
        raise DamagedCheckpoint(f"{path} is damaged: it lists no files.")
    return files


def verify(folder: Path, part: int = 0, parts: int = 1, below: str = "", hashes: bool = True) -> None:
    """Raises DamagedCheckpoint if a file of `folder` is missing or differs in size or SHA-256 from its manifest.

    `hashes` = False compares only sizes. Processes share the hashing: each compares every `parts`-th file from `part`
    on. `below` restricts the check to names with this prefix. Links are refused: they could point outside the folder.
    """
    files = {name: state for name, state in read_manifest(folder).items() if name.startswith(below)}
    for name, state in files.items():
        size = _regular_size(folder, name)
        if size != state.size:
            raise DamagedCheckpoint(f"{folder / name} is damaged: it has {size} bytes, {state.size} were written.")
    if not hashes:
        return
    # Sorted by size, so that each process gets its share of the large files.
    mine = sorted(files, key=lambda name: (files[name].size, name))[part::parts]
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        for name, found in zip(mine, pool.map(lambda name: _digest(folder / name), mine), strict=True):
            if found != files[name].sha256:
                raise DamagedCheckpoint(
                    f"{folder / name} is damaged: its SHA-256 is {found}, {files[name].sha256} was written."
                )


def refuse_links(folder: Path) -> None:
    """Raises DamagedCheckpoint if there is anything but files and folders below `folder`."""
    for _ in _walk(folder):
        pass


def _walk(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder, onerror=_raise):
        for name in names + [name for name in folders if os.path.islink(Path(root, name))]:
            path = Path(root, name)
            if not stat.S_ISREG(path.lstat().st_mode):
                kind = "a link" if path.is_symlink() else "not a file"
                raise DamagedCheckpoint(f"{path} is {kind}: a checkpoint holds files and folders only.")
            if path.parent != folder or not name.startswith(MANIFEST_NAME):
                yield path.relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _sync_and_describe(path: Path) -> FileState:
    sync(path)
    return FileState(path.stat().st_size, file_sha256(path))


def _read_regular(path: Path) -> bytes:
    if path.is_symlink():
        raise DamagedCheckpoint(f"{path} is a link: a checkpoint holds files and folders only.")
    return path.read_bytes()


def _is_state(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    size, digest = entry
    return type(size) is int and size >= 0 and isinstance(digest, str) and _SHA256.fullmatch(digest) is not None


def _regular_size(folder: Path, name: str) -> int:
    """Size of a checkpoint file in bytes; neither it nor a folder above it may be a link."""
    path = folder
    try:
        for part in name.split("/"):
            path = path / part
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise DamagedCheckpoint(f"{path} is a link: a checkpoint holds files and folders only.")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{folder / name} is missing.") from None
    if not stat.S_ISREG(status.st_mode):
        raise DamagedCheckpoint(f"{path} is not a file.")
    return status.st_size


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}).") from error
