"""Output that is whole or not there: it is written beside its place and renamed when it is complete."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bc2_jax.manifest import sync


def check_free(target: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raises FileExistsError if `target` exists and may not be replaced: not without `overwrite`, and never if it is
    something else than `is_ours` knows.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; pass --overwrite to replace it.")
    if target.is_symlink() or not is_ours(target):
        raise FileExistsError(f"{target} exists and is not of the kind that is to be written; not replaced.")


@contextlib.contextmanager
def written_whole(target: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives the path .NAME.partial to write a folder or a file to; when the block ends it gets the name `target`.

    What an interrupted run left under that path is removed first. If the block raises, it is removed and `target` is as
    it was; an older `target` is deleted only after the new one has its name. Raises FileExistsError as `check_free`.
    """
    target = target.absolute()
    check_free(target, overwrite, is_ours)
    partial = target.with_name(f".{target.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    for left in partial.parent.iterdir():
        if left.name == partial.name or left.name.startswith(f"{partial.name}.orbax-checkpoint-tmp"):
            _remove(left)
    try:
        yield partial
        _replace(partial, target)
    except BaseException:
        _remove(partial)
        raise


def _replace(partial: Path, target: Path) -> None:
    if partial.is_dir():
        sync(partial)
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
    sync(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
