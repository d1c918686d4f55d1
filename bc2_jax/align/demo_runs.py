"""Runs of the demo that stand on each other: one that is not there is started first."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.config import RunConfig
from bc2_jax.convert.checkpoints import newest_checkpoint
from bc2_jax.terminal import program_words


def require_run(config: RunConfig, field: str, workdir: str, file: Path, arguments: Sequence[str] = ()) -> None:
    """Runs the config file `file` in `workdir` if no finished run is there; an interrupted one resumes.

    `config` is that of the run whose `field` needs it; `arguments` say what differs from the file. Raises ValueError if
    the run fails, or if it would be started by each of several processes.
    """
    if is_finished(Path(workdir)):
        return
    if config.distributed.num_processes is not None:  # each of them would start it
        raise ValueError(f"{field} = '{workdir}' is not valid: it has no model; run python train.py {file} first.")
    command = [*program_words("train.py"), str(file), "--workdir", workdir, "--resume", "auto", *arguments]
    print(f"{workdir} has no finished run: it is made first.\n{shlex.join(command)}", flush=True)
    if code := subprocess.run(command).returncode:
        raise ValueError(f"{field} = '{workdir}' is not valid: its run ended with exit code {code}.")


def is_finished(workdir: Path) -> bool:
    """Whether a run has the checkpoint of its last step."""
    # Without reading the checkpoint: JAX must not start before the mesh and the processes of this run are known.
    newest, config = newest_checkpoint(workdir.absolute()), workdir / "config.json"
    if newest is None or not config.is_file():
        return newest is not None  # a model of another kind: whoever put it there knows
    return int(newest.name) >= json.loads(config.read_text(encoding="utf-8"))["num_steps"]
