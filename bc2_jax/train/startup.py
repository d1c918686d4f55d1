"""What a start gets and a run returns, the compiled step, and the seconds of each phase of a start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh
from rich.console import Console

from bc2_jax.config import RunConfig
from bc2_jax.metadata import Metadata
from bc2_jax.train.expendable import Expendable
from bc2_jax.train.goodput import Goodput
from bc2_jax.train.job import Batch, Job, Progress, Say, TrainState, TrainStep, lower_train_step
from bc2_jax.train.start import tuned_options


class Start(NamedTuple):
    """Arguments of `make_job` besides the config."""

    mesh: Mesh
    """In use while the job is made."""
    workdir: Path
    step: int
    """Step of the checkpoint that the run resumes from; 0 without one."""
    metadata: Metadata | None
    """Metadata of that checkpoint."""
    console: Console
    """Prints on process 0 only."""
    say: Say
    """Prints a line to `console`."""
    command: str
    """The command after `python` that printed hints repeat."""
    expendable: Expendable
    """Runs work whose failure must not end the run."""
    progress: Progress = lambda done: True
    """Reports the progress of a batch that takes long; False if the run is to stop. All processes call it equally
    often."""


class RunResult(NamedTuple):
    """How a run ended."""

    step: int
    fingerprint: str
    """SHA-256 of the trained parameters."""
    metrics: dict[str, float]
    """Metrics of the last step and its validation."""
    workdir: Path


class StartUp:
    """Seconds of each phase of this start. Two threads may be in different phases at the same time, so they may add up
    to more than the total."""

    def __init__(self, started: float):
        """`started` is the time.monotonic() at which the program began; the time until now is the phase "imports"."""
        self._started = started
        self.seconds: dict[str, float] = {"imports": time.monotonic() - started}
        self._steps_began = started

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def begin_steps(self) -> None:
        """Starts the phase "first step", which `end` ends."""
        self._steps_began = time.monotonic()

    def end(self, say: Say, goodput: Goodput) -> None:
        """Reports all phases at the end of the first step; later calls do nothing."""
        if "total" in self.seconds:
            return
        now = time.monotonic()
        self.seconds["first step"] = now - self._steps_began
        total = now - self._started
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        say(f"start-up: {total:.1f} s to the end of the first step ({phases})")
        self.seconds["total"] = total
        goodput.start_up = dict(self.seconds)  # later batches are no part of the start


def compile_step(
    config: RunConfig, job: Job, mesh: Mesh, state: TrainState, batch: Batch, clock: StartUp
) -> TrainStep:  # fmt: skip
    """The compiled step for this state, arrays or shapes, and batches like this one."""
    with clock.phase("lower"):
        lowered = lower_train_step(
            job.objective, job.optimizer, state, job.frozen, batch, norms=config.health.norms, updates=job.updates
        )
    with clock.phase("compile"):
        return lowered.compile(compiler_options=tuned_options(config, mesh))
