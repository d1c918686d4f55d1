"""The folder that a run writes to, and its lock."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from bc2_jax.agreement import first_decides
from bc2_jax.config import RunConfig
from bc2_jax.files import InUse, lock
from bc2_jax.validation import check_path

LOCK_NAME = ".lock"


def holds_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved checkpoints here."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name[0].isdigit() for path in folder.iterdir())


@contextlib.contextmanager
def own_workdir(config: RunConfig) -> Iterator[Path]:
    """The workdir of the run, locked against other runs until the block ends.

    It is `config.workdir`, else the first of runs/NAME, runs/NAME-2, ... that has no checkpoints and no running owner;
    to resume, the last one with checkpoints. Raises on every process, before anything is written: InUse if a running
    process owns it, ValueError if it cannot hold checkpoints.
    """
    with contextlib.ExitStack() as owned:
        yield Path(first_decides(lambda: str(_own(config, owned))))


def _own(config: RunConfig, owned: contextlib.ExitStack) -> Path:
    if config.workdir is not None:
        workdir = Path(config.workdir).expanduser()
        _lock(workdir, owned)
        return workdir
    candidates = (Path("runs", config.name if i == 1 else f"{config.name}-{i}") for i in itertools.count(1))
    used = None
    for workdir in candidates:
        if not holds_checkpoints(workdir):
            if used is not None and config.resume == "auto":
                break
            with contextlib.suppress(InUse), contextlib.ExitStack() as attempt:
                _lock(workdir, attempt)
                if not holds_checkpoints(workdir):  # its owner may just have ended
                    owned.enter_context(attempt.pop_all())
                    return workdir
        used = workdir
    assert used is not None
    _lock(used, owned)
    return used


def _lock(workdir: Path, owned: contextlib.ExitStack) -> None:
    check_path("workdir", workdir)
    owned.enter_context(lock(workdir / LOCK_NAME, f"workdir = '{workdir}'"))
