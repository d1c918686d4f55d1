"""A run's metrics on Weights & Biases, beside TensorBoard: only with `wandb_project`, and never imported otherwise."""

from __future__ import annotations

import dataclasses
import importlib.util
import secrets
from pathlib import Path
from typing import Any

import jax

from bc2_jax.config import RunConfig
from bc2_jax.files import replaced

ID_NAME = "wandb_run_id"
"""Of the file in the workdir that a resumed run continues its W&B run by."""


def check_wandb(config: RunConfig) -> None:
    """Raises ValueError if the run wants W&B and the extra is not installed."""
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb_project = {config.wandb_project!r} is not valid here: it needs pip install 'bc2_jax[wandb]'."
        )


class WandbRun:
    """The W&B run of a workdir, opened at the first metrics; it does nothing on other processes than the first."""

    def __init__(self, config: RunConfig, workdir: Path) -> None:
        self._config, self._workdir = config, workdir
        self._run: Any = None
        self._is_on = jax.process_index() == 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a step. If the run cannot be opened this raises once, and later does nothing."""
        if not self._is_on:
            return
        if self._run is None:
            self._is_on = False
            self._run = self._open()
            self._is_on = True
        # Not by W&B's own step, which cannot return to an earlier one as a run that resumes or rewinds does.
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def _open(self) -> Any:
        import wandb

        file = self._workdir / ID_NAME
        if not file.is_file():
            with replaced(file) as partial:
                partial.write_text(secrets.token_hex(4), encoding="utf-8")
        run = wandb.init(
            project=self._config.wandb_project, name=self._config.name, id=file.read_text(encoding="utf-8").strip(),
            resume="allow", dir=str(self._workdir), config=dataclasses.asdict(self._config),
            settings=wandb.Settings(login_timeout=30, console="off"),
        )  # fmt: skip
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run
