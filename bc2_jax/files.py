"""Files: locks, atomic and durable writes, hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_log = logging.getLogger(__name__)
_OWNER_READS, _OWNER_WAIT_S, _OWNER_BYTES = 50, 0.02, 4096


class InUse(OSError):
    """Another process owns the file or folder; the message names it."""


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[bool]:
    """Holds the lock file `path` (flock) until the block ends; `what` names the locked thing in messages.

    The kernel releases the lock when the process ends, however it ends; Linux also enforces it between hosts on NFS.
    Missing folders are created and removed again if they stay empty. Raises InUse within a second if there is another
    owner, in this process too. Yields True; on a file system without locks it warns and yields False.
    """
    made = _make_parents(path)
    file, owned = _open_locked(path, what)
    try:
        yield owned
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while locked: a process that waits for this file then sees that it was removed
        file.close()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _make_parents(path: Path) -> list[Path]:
    """Creates the folders above `path`; returns the new ones, innermost first."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _open_locked(path: Path, what: str) -> tuple[IO[str], bool]:
    while True:
        owned = True
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the previous owner has just removed its empty folder
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                owner = _describe_owner(file)
                file.close()
                raise InUse(f"{what} is in use by {owner}; wait until it ends or stop it.") from None
            owned = False
            _log.warning("%s cannot be locked (%s): a second user would not be noticed.", what, error.strerror)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
                file.flush()
                return file, owned
        file.close()  # its owner removed it between open and flock: other processes lock a new file


def _describe_owner(file: IO[str]) -> str:
    """The owner's process and host. It writes them once it has the lock; until then the file may name a dead owner.

    A process of another host counts as alive.
    """
    for _ in range(_OWNER_READS):
        try:
            owner = json.loads(os.pread(file.fileno(), _OWNER_BYTES, 0))
            host, pid = str(owner["host"]), int(owner["pid"])
            if host != socket.gethostname() or _is_alive(pid):
                return f"process {pid} on {host}"
        except (ValueError, KeyError, TypeError):
            pass
        time.sleep(_OWNER_WAIT_S)
    return "another process"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextlib.contextmanager
def replaced(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to; it replaces `path` if the block ends without an error.

    A process killed at any time leaves the old file or the new one, whole. `durable` syncs the file and its folder to
    disk. `shared` makes the temporary name unique, for a file that several processes may write at once.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial" if shared else f"{path.name}.partial")
    yield partial
    if durable:
        sync(partial)
    partial.replace(path)
    if durable:
        sync(path.parent)


def append_lines(path: Path, lines: bytes) -> None:
    """Appends whole lines to a file and syncs it to disk; an unfinished last line of a killed process is removed."""
    with path.open("r+b" if path.is_file() else "w+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
        file.write(lines)
    sync(path)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive a power cut (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any, *, sort_keys: bool = True) -> str:
    """SHA-256 of a value's JSON text, in hex; what JSON cannot hold, such as a path, counts as its `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys, default=str).encode()).hexdigest()


def file_store(folder: Path) -> dict[str, Any]:
    """TensorStore's key-value store of a folder, as a path: it would decode a file:// URL.

    The path may contain `..` only where `validation.check_path` allows it.
    """
    return {"driver": "file", "path": f"{os.path.abspath(folder)}/"}
