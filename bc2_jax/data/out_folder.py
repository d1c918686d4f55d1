"""Exclusive, atomic output folders of packed rows: one writer at a time, complete or not at all."""

from __future__ import annotations

import contextlib
import glob
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from bc2_jax.files import lock
from bc2_jax.validation import choices

_MARKERS = ("manifest.json", "corpus.json")
"""One of these is in every folder of packed rows or of a corpus."""
_WRITTEN = re.compile(
    r"manifest\.json|corpus\.json|conversations\.json|questions\.jsonl|pairs\.jsonl|margins\.npz|problems\.txt|"
    r"(?:train|validation)-\d{5}(?:-of-\d{5})?\.array_record"
)
_NAMED_FILES = 3


@contextlib.contextmanager
def own_folder(out: Path, overwrite: bool) -> Iterator[Callable[[Path], None]]:
    """Locks `out` for this process and gives publish(FINISHED), which renames a finished folder beside `out` to `out`.

    Raises FileExistsError, before the block and again before the renaming, if `out` exists, unless `overwrite` and it
    has nothing but files of packing; InUse if another process has the lock.
    """
    _check_free(out, overwrite)
    with lock(out.with_name(f".{out.name}.lock"), f"out_dir = {str(out)!r}"):
        _check_free(out, overwrite)

        def publish(finished: Path) -> None:
            _check_free(out, overwrite)  # hours may have passed
            _rename(finished, out)

        yield publish


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    legal = "only a folder of packed rows can be overwritten" if overwrite else "choose another or pass overwrite"
    is_packed = any((out / name).is_file() for name in _MARKERS)
    ours = overwrite and out.is_dir() and (is_packed or not any(out.iterdir()))
    files = sorted(path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()) if ours else []
    foreign = [str(path.relative_to(out)) for path in files if path.is_symlink() or not _WRITTEN.fullmatch(path.name)]
    if foreign:
        legal = f"it also has {choices(foreign[:_NAMED_FILES])}, which packing did not write"
    if foreign or not ours:
        raise FileExistsError(f"out_dir = {str(out)!r} is not valid: it exists; {legal}.")


def _rename(finished: Path, out: Path) -> None:
    if out.exists():
        replaced = out.with_name(f".{out.name}.{uuid.uuid4().hex}.replaced")
        out.rename(replaced)
        finished.rename(out)
        # Also those of runs that were killed here.
        for folder in out.parent.glob(f".{glob.escape(out.name)}.*.replaced"):
            shutil.rmtree(folder, ignore_errors=True)
    else:
        finished.rename(out)
