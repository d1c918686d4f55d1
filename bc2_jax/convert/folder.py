"""Output that is whole or not there: it is written beside its place and renamed when it is complete."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bc2_jax.convert.hf import join_some
from bc2_jax.files import lock, sync
from bc2_jax.validation import require

# File systems take 255; staging, locking and Orbax put up to 43 around it.
_MAX_NAME = 210

Foreign = Callable[[Path], list[str]]
"""What of an existing target no conversion wrote, by name: see `ownership`."""


def check_free(target: Path, overwrite: bool, foreign: Foreign) -> None:
    """Raises FileExistsError if `target` exists and may not be replaced: not without `overwrite`, and never if it is a
    link or holds what `foreign` names. Raises ValueError if its name is too long.
    """
    length = len(os.fsencode(target.name))
    legal = f"its name has {length} bytes; at most {_MAX_NAME} are possible"
    require(length <= _MAX_NAME, "target", str(target), legal)
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; pass --overwrite to replace it.")
    if target.is_symlink():
        raise FileExistsError(f"{target} is a link: not replaced; give the place that it leads to.")
    if names := foreign(target):
        raise FileExistsError(
            f"{target} is not replaced, as no conversion wrote {join_some(names, 8)}: move that away, or give another "
            "target."
        )


@contextlib.contextmanager
def written_whole(target: Path, overwrite: bool, foreign: Foreign) -> Iterator[Path]:
    """Gives a new path .NAME.partial-XXXXXXXX to write a folder or a file to; when the block ends it is synced to disk
    and gets the name `target`.

    Whoever is in the block owns the target: another process gets `files.InUse`. What a killed owner left is removed.
    If the block raises, what it wrote is removed and `target` is as it was; an older `target` is deleted only after the
    new one has its name. Raises FileExistsError as `check_free`, also for a target that appears meanwhile.
    """
    target = target.absolute()
    check_free(target, overwrite, foreign)
    with lock(target.with_name(f".{target.name}.lock"), f"The target {target}") as owned:
        if owned:
            _clean_up(target)
        check_free(target, overwrite, foreign)
        token = secrets.token_hex(4)
        partial = target.with_name(f".{target.name}.partial-{token}")
        try:
            yield partial
            _sync_all(partial)
            check_free(target, overwrite, foreign)
            _replace(partial, target, target.with_name(f".{target.name}.replaced-{token}"))
        finally:
            for left in _leftovers(target, token):
                _remove(left)


def _leftovers(target: Path, token: str = "[0-9a-f]{8}") -> list[Path]:
    """What `written_whole` calls what it has not finished; Orbax adds to the name while it writes."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-{token}(\.orbax-checkpoint-tmp.*)?", re.DOTALL)
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]


def _clean_up(target: Path) -> None:
    """Removes what dead owners left; brings back a target that one was killed replacing."""
    for left in _leftovers(target):
        if left.name.startswith(f".{target.name}.replaced-") and not target.exists():
            left.rename(target)
        else:
            _remove(left)


def _replace(partial: Path, target: Path, old: Path) -> None:
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise
    sync(target.parent)


def _sync_all(path: Path) -> None:
    """Nothing that has its final name may be empty after a power cut."""
    for root, _, names in os.walk(path):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))
    if not path.is_dir():
        sync(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
