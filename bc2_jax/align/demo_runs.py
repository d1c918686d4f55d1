"""Runs that depend on an earlier run, which is started first if it is missing."""

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
    """Runs the config file `file` with `arguments` in `workdir`, unless a finished run is there; an interrupted one
    resumes.

    `field` of `config`, the config of the dependent run, is named in errors. Raises ValueError if the run fails, or if
    several processes would start it.
    """
    if is_finished(Path(workdir)):
        return
    if config.distributed.num_processes is not None:  # each process would start it
        raise ValueError(f"{field} = '{workdir}' is not valid: it has no model; run python train.py {file} first.")
    command = [*program_words("train.py"), str(file), "--workdir", workdir, "--resume", "auto", *arguments]
    print(f"{workdir} has no finished run; starting it first.\n{shlex.join(command)}", flush=True)
    if code := subprocess.run(command).returncode:
        raise ValueError(f"{field} = '{workdir}' is not valid: its run ended with exit code {code}.")


def is_finished(workdir: Path) -> bool:
    """Whether a run has the checkpoint of its last step."""
    # Does not read the checkpoint: JAX must not start before mesh and processes are known.
    newest, config = newest_checkpoint(workdir.absolute()), workdir / "config.json"
    if newest is None or not config.is_file():
        return newest is not None  # a model of another origin counts as finished
    return int(newest.name) >= json.loads(config.read_text(encoding="utf-8"))["num_steps"]
