"""Restoring a checkpoint on the mesh, and verifying that a resumed run is bit-exact."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bc2_jax.agreement import first_decides
from bc2_jax.checkpoint import Checkpointer
from bc2_jax.config import RunConfig
from bc2_jax.metadata import Metadata
from bc2_jax.model.baichuan import Params
from bc2_jax.train.goodput import Goodput
from bc2_jax.train.job import Job, Say, TrainState, TrainStep
from bc2_jax.train.metrics import fingerprint


def find_checkpoint(config: RunConfig, checkpointer: Checkpointer, goodput: Goodput) -> tuple[int, Metadata | None]:
    """Step and metadata of the checkpoint to resume from, or (0, None). Raises ValueError if the run may not resume."""
    workdir = goodput.path.parent
    saved = first_decides(checkpointer.steps)
    if saved and config.resume == "never":
        raise ValueError(
            f"workdir = '{workdir}' already holds checkpoints up to step {saved[-1]}; "
            "pass --resume auto to resume from there, or another --workdir."
        )
    with goodput.phase("restore"):
        step = goodput.start_step = checkpointer.latest_good() or 0
    if step > config.num_steps:
        raise ValueError(f"num_steps = {config.num_steps} is not valid: the run in '{workdir}' is at {step}.")
    return step, checkpointer.metadata(step) if step else None


class Restorer(Protocol):
    """A Checkpointer, or another reader of its checkpoints."""

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any]: ...


def restore_state(checkpointer: Restorer, step: int, abstract: TrainState) -> TrainState:
    """The state saved at a step, on the mesh of `abstract`, whatever mesh it was saved on."""
    params, opt_state = checkpointer.restore(step, abstract.params, abstract.opt_state)
    # Skipped updates are not counted, so this is not the step. A copy, because the step donates both.
    count = next(
        leaf for path, leaf in jax.tree.leaves_with_path(opt_state) if jax.tree_util.keystr(path).endswith(".count")
    )
    return TrainState(params, opt_state, jax.device_put(jnp.copy(count), abstract.step.sharding))


def verify_resume(
    job: Job, train_step: TrainStep, checkpointer: Checkpointer, step: int, last: int, uninterrupted: str, say: Say
) -> None:
    """Repeats the steps from the checkpoint of `step` to `last` and checks that the parameters are the same bits.

    Raises ArithmeticError unless their SHA-256 is `uninterrupted`.
    """
    again = restore_state(checkpointer, step, job.abstract_state)
    job.batches.seek(checkpointer.metadata(step).data)
    for number in range(step + 1, last + 1):
        if (batch := job.batches.next(number, again)) is None:
            say("Exact resume was not verified: the run is stopping.")
            return
        again, _ = train_step(again, job.frozen, batch)
    resumed = fingerprint(again.params)
    if resumed != uninterrupted:
        raise ArithmeticError(
            f"The resume is not exact: from step {step} the run ended in {resumed}, without a stop in {uninterrupted}."
        )
    say(f"Resumed at step {step} and repeated: the parameters are the same bit for bit.")
