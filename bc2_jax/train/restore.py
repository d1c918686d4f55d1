"""The state of a checkpoint on the mesh, and the proof that a run which resumes is the run that never stopped."""

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
    """Step and metadata of the checkpoint to go on from, or (0, None). Raises ValueError if the run may not go on."""
    workdir = goodput.path.parent
    saved = first_decides(checkpointer.steps)
    if saved and config.resume == "never":
        raise ValueError(
            f"workdir = '{workdir}' already holds checkpoints up to step {saved[-1]}; "
            "pass --resume auto to go on from there, or another --workdir."
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
    """The state saved at a step, on the mesh of `abstract` whatever the mesh it was saved from."""
    params, opt_state = checkpointer.restore(step, abstract.params, abstract.opt_state)
    # Updates done are fewer than steps where some were skipped. A copy: the step donates both.
    count = next(
        leaf for path, leaf in jax.tree.leaves_with_path(opt_state) if jax.tree_util.keystr(path).endswith(".count")
    )
    return TrainState(params, opt_state, jax.device_put(jnp.copy(count), abstract.step.sharding))


def verify_resume(
    job: Job, train_step: TrainStep, checkpointer: Checkpointer, step: int, last: int, uninterrupted: str, say: Say
) -> None:
    """Does the steps after the checkpoint of `step` up to the `last` again, and says that the bits are the same.

    Raises ArithmeticError unless their fingerprint is `uninterrupted`.
    """
    again = restore_state(checkpointer, step, job.abstract_state)
    job.batches.seek(checkpointer.metadata(step).data)
    for number in range(step + 1, last + 1):
        if (batch := job.batches.next(number, again)) is None:
            say("Exact resume is not verified: the run is stopping.")
            return
        again, _ = train_step(again, job.frozen, batch)
    resumed = fingerprint(again.params)
    if resumed != uninterrupted:
        raise ArithmeticError(
            f"Resumed at step {step}, the run ended in {resumed}, not in {uninterrupted}: it is not exact."
        )
    say(f"Resumed at step {step} and repeated: the parameters are the same bit for bit.")
