"""Where a run writes, and that it alone does."""

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
    """Whether a run was here."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name[0].isdigit() for path in folder.iterdir())


@contextlib.contextmanager
def own_workdir(config: RunConfig) -> Iterator[Path]:
    """The workdir of the run, which no other run can have until the block ends.

    It is that of the config; else the first of runs/NAME, runs/NAME-2, ... without checkpoints that no live run has,
    or, to resume, the last one with checkpoints. A run that failed at its start leaves none. Raises, on every process
    and before anything in it is touched, InUse if a live run owns it, and ValueError if no checkpoint can be there.
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
                if not holds_checkpoints(workdir):  # else its owner has just ended
                    owned.enter_context(attempt.pop_all())
                    return workdir
        used = workdir
    assert used is not None
    _lock(used, owned)
    return used


def _lock(workdir: Path, owned: contextlib.ExitStack) -> None:
    check_path("workdir", workdir)
    owned.enter_context(lock(workdir / LOCK_NAME, f"workdir = '{workdir}'"))
