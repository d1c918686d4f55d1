"""A run as data: state, objective, batches, and the training step that all kinds of run share.

A kind of run (pre-training, fine-tuning, preferences, reinforcement learning) is a function from its config to a `Job`;
`bc2_jax.train.loop` runs it without knowing the kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bc2_jax.data.batch import AbstractBatch, Batch, Rows
from bc2_jax.data.row_batches import no_fields
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.sharding import place_shapes, platform
from bc2_jax.train.health import EMPTY, batch_checksum, keep_unless, norm_metrics
from bc2_jax.train.optimizer import Optimizer

Say = Callable[[str], None]


class TrainState(NamedTuple):
    """What an update changes and a checkpoint holds."""

    params: Params
    """fp32 master weights of the trained parameters."""
    opt_state: Any
    step: Array
    """Updates done, int32 scalar; skipped ones do not count."""


class Parts(NamedTuple):
    """What an objective reports of a batch besides its loss: fp32 scalars by name."""

    sums: dict[str, Array]
    """Added over micro-batches and over the batches of an evaluation."""
    maxima: dict[str, Array]

    def plus(self, other: Parts) -> Parts:
        """The parts of both batches together."""
        return Parts(
            {name: x + other.sums[name] for name, x in self.sums.items()},
            {name: jnp.maximum(x, other.maxima[name]) for name, x in self.maxima.items()},
        )


class Objective(NamedTuple):
    """What is minimised: the sum of `loss` over a batch, divided by `weight`. Pure functions of arrays."""

    loss: Callable[[Params, Params, Batch], tuple[Array, Parts]]
    """(trained parameters, frozen ones, micro-batch [B, T]) -> (sum of the loss, its parts)."""
    weight: Callable[[Batch], Array]
    """The whole batch [A, B, T] -> fp32 scalar, such as its number of targets; with 0 there is no update."""
    metrics: Callable[[Parts], dict[str, Array]]
    """Parts of the whole batch -> metrics, including "loss"."""
    norms: Callable[[Params], dict[str, Array]] = lambda params: {}
    """Metrics of the trained parameters after the update, if health.norms is set."""
    summary: Callable[[dict[str, float]], str] = lambda metrics: f"loss {metrics['loss']:.4f}"
    """Metrics of an evaluation -> text that is printed."""


class StepParts(NamedTuple):
    """The components of a run's training step, known before any parameter exists.

    Made by `make_step(config, mesh)` of each kind of run, under `jax.set_mesh(mesh)`, also to compile or repeat a step
    without the run.
    """

    objective: Objective
    optimizer: Optimizer
    state: TrainState
    """Shapes and shardings."""
    batch: AbstractBatch
    """Shapes and shardings of every field."""
    flops_per_step: int
    """Model FLOPs of a step, all updates together."""
    updates: int = 1
    """As `Job.updates`."""
    frozen: Params = {}
    """Shapes and shardings of the parameters that are not trained."""
    load_frozen: Callable[[], Params] = dict
    """Reads them."""
    fields: Callable[[Rows], Rows] = no_fields
    """Rows on the host -> further fields of their batch besides FIELDS, [rows, W] each; for held-out rows too."""
    complete: Callable[[int, Batch], Batch] = lambda step, batch: batch
    """(step, batch with the fields from its rows) -> batch with all fields."""


class BatchError(ArithmeticError):
    """No further batch can be made, on any process: the run stops after saving the previous step."""


class Batches(Protocol):
    """The source of the batches of training steps: rows of files, pairs, rollouts."""

    def next(self, step: int, state: TrainState) -> Batch | None:
        """The batch of a step on the mesh, [A, B, ...] each field; `state` is the state before the step.

        Called once per step, in order, while the previous step may still run on the devices. None if `Start.progress`
        reported, to all processes, that the run is to stop: nothing of the batch is kept and `position` does not
        change. Raises BatchError, on all processes, if there cannot be another batch.
        """

    def position(self) -> dict[str, Any]:
        """JSON values from which `seek` continues after the batch that `next` returned last."""

    def seek(self, position: dict[str, Any]) -> None:
        """Continues from a position; skipped batches stay skipped."""

    def skip(self, first: int, last: int) -> dict[str, Any]:
        """Skips the batches of steps `first` to `last` from now on.

        Returns JSON values for the log, including `rows`, the number of rows skipped.
        """

    def metrics(self, step: int) -> dict[str, float]:
        """Metrics of a step's data, known on the host."""

    def save(self, step: int, folder: Path, about: dict[str, Any]) -> Path | None:
        """Writes this process's rows of a recent batch and the values `about` it; None if the batch is gone."""

    def close(self) -> None: ...


Progress = Callable[[str], bool]
"""Receives the progress of an evaluation, to be followed by " at step N"; False means stop."""
Examine = Callable[[int, Params, Progress], dict[str, float] | None]
"""(step, trained parameters, progress) -> metrics, or None if it was stopped. All processes call it."""


class Job(NamedTuple):
    """A run that is ready to start. Making it writes nothing."""

    objective: Objective
    optimizer: Optimizer
    abstract_state: TrainState
    """Shapes and shardings onto which a checkpoint is restored."""
    init_state: Callable[[], TrainState]
    """The state before the first update."""
    batches: Batches
    begin: Callable[[Path], None]
    """Called with the workdir before the first step: writes the job's files and prints its tables."""
    finish: Callable[[Path, Params], None]
    """Called at the end with the last checkpoint and its parameters: export, samples, pictures."""
    flops_per_step: int
    """Model FLOPs of a step, all updates together."""
    flops_formula: str = "6 x matmul parameters x tokens + causal attention"
    """Explains `flops_per_step` in the log."""
    frozen: Params = {}
    """Parameters that the loss reads; not trained, differentiated or saved."""
    validation: Sequence[Batch] = ()
    """Held-out batches, placed on the mesh on access."""
    examine: Examine | None = None
    """A further evaluation of the parameters, after that of the held-out batches."""
    language_model: Callable[[Params], Baichuan2] | None = None
    """The model of the trained parameters, for further evaluations; None if it does not generate text."""
    metadata: dict[str, Any] = {}
    """JSON values saved with each checkpoint besides the loop's own."""
    updates: int = 1
    """Updates per step: the leading dimension of the batch is this many groups of accumulation steps."""
    check: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    """Receives the metrics of every step before the step is saved; raises ArithmeticError, on every process, if the run
    is broken."""
    samples: bool = False
    """Batches are rollouts of the current parameters. The loop then waits for the step first, so that its time counts
    as productive and the rest as rollouts rather than as waiting for data."""


# --------------------------------------------------------------------------------------------------------------- state


def init_state(params: Params, optimizer: Optimizer) -> TrainState:
    """The state before the first update; moments are laid out as the parameters."""
    return TrainState(params, jax.jit(optimizer.init)(params), jnp.zeros((), jnp.int32))


def abstract_state(params: Params, optimizer: Optimizer) -> TrainState:
    """Shapes and shardings of the state, from abstract parameters with shardings; call it under their mesh."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    rest = jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(params, *place_shapes(mesh, rest))


# ---------------------------------------------------------------------------------------------------------------- step

TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(objective: Objective, optimizer: Optimizer, norms: bool = True, updates: int = 1) -> TrainStep:
    """(state, frozen parameters, batch [updates * A, B, ...]) -> (state after the updates, metrics).

    Each update uses its own A accumulation steps. The state is returned unchanged if the loss or gradient norm is not
    finite, or if the weight is 0 (an update would only decay the weights and follow old moments).

    With several updates, metrics of the objective cover all parts; norms and the learning rate are those of the last
    update, but grad_norm and update_ratio are the largest; a batch is empty if all its updates are.
    """

    def update(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Parts, dict[str, Array]]:
        """One update: the new state, its parts, and its other metrics."""
        weight = objective.weight(batch)
        empty = weight == 0
        weight = jnp.where(weight > 0, weight, 1.0)

        def mean_loss(params: Params, micro: Batch) -> tuple[Array, Parts]:
            loss, parts = objective.loss(params, frozen, micro)
            return loss / weight, parts

        def accumulate(grads: Params, micro: Batch) -> tuple[Params, Parts]:
            (_, parts), more = jax.value_and_grad(mean_loss, has_aux=True)(state.params, micro)
            return jax.tree.map(jnp.add, grads, more), parts

        if jax.tree.leaves(batch)[0].shape[0] == 1:
            first = jax.tree.map(lambda x: x[0], batch)
            (_, parts), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params, first)
        else:
            grads, stacked = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), batch)
            parts = _add_up(stacked)
        with jax.named_scope("optimizer"):
            changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, changes)
            grad_norm = optax.tree.norm(grads)
            metrics = {"grad_norm": grad_norm, "learning_rate": optimizer.learning_rate(state.step)}
            done = jnp.isfinite(objective.metrics(parts)["loss"]) & jnp.isfinite(grad_norm) & ~empty
            new_state = keep_unless(done, TrainState(params, opt_state, state.step + 1), state)
        metrics |= {EMPTY: empty}
        if norms:
            metrics |= norm_metrics(new_state.params, changes, done)
        return new_state, parts, metrics

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        if updates == 1:
            state, parts, metrics = update(state, frozen, batch)
        else:

            def run(state: TrainState, group: Batch) -> tuple[TrainState, tuple[Parts, dict[str, Array]]]:
                state, parts, metrics = update(state, frozen, group)
                return state, (parts, metrics)

            groups = jax.tree.map(lambda x: x.reshape(updates, -1, *x.shape[1:]), batch)
            state, (stacked, each) = jax.lax.scan(run, state, groups)
            parts = _add_up(stacked)
            metrics = {name: _OF_SEVERAL.get(name, lambda x: x[-1])(x) for name, x in each.items()}
        metrics = objective.metrics(parts) | metrics | {"batch_checksum": batch_checksum(batch)}
        return state, metrics | (objective.norms(state.params) if norms else {})

    return train_step


# Maxima keep a value that is not finite.
_OF_SEVERAL: dict[str, Callable[[Array], Array]] = {"grad_norm": jnp.max, "update_ratio": jnp.max, EMPTY: jnp.all}


def lower_train_step(
    objective: Objective, optimizer: Optimizer, state: TrainState, frozen: Params, batch: Batch | AbstractBatch, *,
    norms: bool = True,
    updates: int = 1,
) -> jax.stages.Lowered:  # fmt: skip
    """Lowers the jitted step for these arguments, arrays or shapes; it donates the state alone, on a CPU nothing."""
    step = make_train_step(objective, optimizer, norms, updates)
    # XLA:CPU would not update the state in place: it copies all of it first, which takes time and as much memory.
    return jax.jit(step, donate_argnums=() if platform() == "cpu" else 0).lower(state, frozen, batch)


def make_eval_step(objective: Objective) -> Callable[[Params, Params, Batch], Parts]:
    """(trained parameters, frozen ones, batch [A, B, ...]) -> parts of the whole batch."""

    def eval_step(params: Params, frozen: Params, batch: Batch) -> Parts:
        _, stacked = jax.lax.scan(lambda _, micro: (None, objective.loss(params, frozen, micro)[1]), None, batch)
        return _add_up(stacked)

    return eval_step


def _add_up(stacked: Parts) -> Parts:
    """Parts of A micro-batches, [A] each -> parts of all, added in order."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    return functools.reduce(Parts.plus, (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)))
