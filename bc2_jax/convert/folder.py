"""Output that is whole or not there: it is written beside its place and renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_free(target: Path, overwrite: bool, marks: tuple[str, ...] = ()) -> None:
    """Raises FileExistsError if `target` exists and may not be replaced.

    With `overwrite` a file may be, and a folder that holds one of `marks`, the files by which ours are known.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; pass --overwrite to replace it.")
    if target.is_symlink() or (target.is_dir() and not any((target / mark).is_file() for mark in marks)):
        raise FileExistsError(f"{target} exists and is not a folder with a {' or '.join(marks)}; not replaced.")


@contextlib.contextmanager
def written_whole(target: Path, overwrite: bool, marks: tuple[str, ...] = ()) -> Iterator[Path]:
    """Gives the path .NAME.partial to write a folder or a file to; when the block ends it gets the name `target`.

    What an interrupted run left under that path is removed first. If the block raises, it is removed and `target` is as
    it was; an older `target` is deleted only after the new one has its name. Raises FileExistsError as `check_free`.
    """
    target = target.absolute()
    check_free(target, overwrite, marks)
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _replace(partial, target)
    except BaseException:
        _remove(partial)
        raise


def _replace(partial: Path, target: Path) -> None:
    if partial.is_dir():
        _sync(partial)
    old = target.with_name(f".{target.name}.replaced")
    if target.exists():
        _remove(old)
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes the entries of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
