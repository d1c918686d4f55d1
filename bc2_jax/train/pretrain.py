"""Pre-training (paper section 2.4): next-token prediction on packed rows of text."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import ComputeConfig, ModelConfig, RunConfig, TrainConfig
from bc2_jax.convert.pretrained import load_params
from bc2_jax.data.batch import Batch, abstract_batch
from bc2_jax.data.loader import record_row_order
from bc2_jax.data.row_batches import RowBatches, ValidationBatches, next_row
from bc2_jax.data.row_file import BadRows
from bc2_jax.files import file_sha256, replaced
from bc2_jax.model.baichuan import Baichuan2, Params, abstract_params, init_params, split_model
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.checks import (
    check_export,
    check_initial_model,
    check_row_kinds,
    check_same_model,
    check_same_tokenizer,
    check_samples,
    check_tokenizer,
    warn_of_other_rows,
)
from bc2_jax.train.job import Job, Objective, Parts, StepParts, TrainState, abstract_state, init_state
from bc2_jax.train.loop import RunResult, Start, run
from bc2_jax.train.loss import LossSums, count_targets, head_loss
from bc2_jax.train.optimizer import Optimizer, make_optimizer
from bc2_jax.train.results import finish_run, make_baselines, print_mixture, print_tables
from bc2_jax.train.resume import Change, check_changes, list_changes, print_changes

_log = logging.getLogger(__name__)


def train(config: TrainConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Pre-trains as `config` says; see `loop.run`."""
    return run(config, make_job, command, started)


def complete(config: TrainConfig) -> TrainConfig:
    """Fills in config fields that depend on the data: none here."""
    return config


def make_step(config: TrainConfig, mesh: Mesh) -> StepParts:
    """The training step of a run that trains all parameters."""
    optimizer = make_optimizer(config.optimizer)
    return StepParts(
        objective=make_objective(config.model, config.compute),
        optimizer=optimizer,
        state=make_abstract_state(config, mesh, optimizer),
        batch=abstract_batch(config.data, mesh),
        flops_per_step=flops_per_step(config),
    )


def make_job(config: TrainConfig, start: Start, step: StepParts | None = None) -> Job:
    """The job of `config`, with the training step `step` if given.

    Raises ValueError or FileNotFoundError, naming the field, if the run cannot start.
    """
    changes: list[Change] = []
    if start.metadata is None:
        check_initial_model(config)
    else:
        changes = list_changes(config, start.metadata)
        check_same_model(config, start.metadata, start.workdir)
        check_changes(config, start.metadata, start.workdir, changes)
        warn_of_other_rows(config, start.metadata, start.step)
    check_row_kinds(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    check_tokenizer(config.model, tokenizer)
    check_same_tokenizer(config, "data.tokenizer", tokenizer, start)
    check_samples(config, tokenizer)
    check_export(config, start.workdir)
    bad_rows = BadRows(config.data.max_bad_rows)
    row = 0 if start.metadata is None else next_row(start.metadata.data, config.data.sequence_length)
    step = make_step(config, start.mesh) if step is None else step
    baselines: dict[str, float] = {}

    def init() -> TrainState:
        if config.init_from is None:
            return init_state(init_params(config.model, config.seed, start.mesh), step.optimizer)
        # In fp32; each device reads its own shard.
        return init_state(load_params(config.init_from, "float32", start.mesh)[0], step.optimizer)

    def begin(workdir: Path) -> None:
        if jax.process_index() == 0:
            keep_tokenizer(workdir, config.data.tokenizer, tokenizer.fingerprint, start.step)
        print_tables(start.console, config, start.mesh)
        print_mixture(start.console, config, start.step, row)
        print_changes(start.console, changes)
        if config.ngram_baselines and jax.process_index() == 0:
            with start.expendable.attempt("baselines"):
                baselines.update(make_baselines(config, start.console))
        if start.metadata is None and config.init_from is not None:
            start.say(f"Parameters from {config.init_from}.")

    return Job(
        objective=step.objective,
        optimizer=step.optimizer,
        abstract_state=step.state,
        init_state=init,
        batches=RowBatches(
            config.data, start.mesh, config.num_steps, bad_rows, (start.step, row), step.complete, step.fields
        ),
        validation=ValidationBatches(config.data, start.mesh, bad_rows, step.fields),
        begin=begin,
        finish=lambda checkpoint, params: finish_run(config, checkpoint, params, baselines, tokenizer, start),
        flops_per_step=step.flops_per_step,
        language_model=lambda params: nnx.merge(split_model(config.model, config.compute)[0], params),
        metadata={"row_order": record_row_order(config.data), "tokenizer_sha256": tokenizer.fingerprint},
    )


def flops_per_step(config: TrainConfig) -> int:
    """Model FLOPs of one update on the whole batch."""
    return config.data.global_batch_size * config.model.flops_per_sequence(config.data.sequence_length)


def make_abstract_state(config: RunConfig, mesh: Mesh, optimizer: Optimizer) -> TrainState:
    """Shapes and shardings of the state if all parameters are trained; call it under `jax.set_mesh(mesh)`."""
    return abstract_state(abstract_params(config.model, mesh), optimizer)


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(model: ModelConfig, compute: ComputeConfig) -> Objective:
    """Cross entropy and max-z (`head_loss`) of the next token, averaged over the valid targets of the batch."""
    return Objective(
        loss=make_loss(model, compute),
        weight=lambda batch: count_targets(batch["labels"]),
        metrics=lambda parts: mean_metrics(parts, model.z_loss_weight),
        norms=head_norms,
        summary=lambda metrics: f"cross entropy {metrics['cross_entropy']:.4f}, accuracy {metrics['accuracy']:.1%}",
    )


Build = Callable[[Params, Params, Batch], Baichuan2]
"""(trained parameters, frozen ones, micro-batch) -> the model that computes its loss."""


def make_loss(
    model: ModelConfig, compute: ComputeConfig, build: Build | None = None,
    weigh: Callable[[Batch], Array] | None = None,
) -> Callable[[Params, Params, Batch], tuple[Array, Parts]]:  # fmt: skip
    """`Objective.loss`: the sum over the valid targets of a micro-batch [B, T].

    By default all parameters are trained and every target has weight 1; `weigh` gives other weights, fp32 [B, T].
    """
    graphdef, _, _ = split_model(model, compute)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Parts]:
        module = nnx.merge(graphdef, params) if build is None else build(params, frozen, batch)
        h_BTD = module.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
        value, sums = head_loss(
            h_BTD, module.lm_head.rows(), batch["labels"], model.z_loss_weight, compute.loss_chunk,
            None if weigh is None else weigh(batch),
        )  # fmt: skip
        return value, sum_parts(sums)

    return loss


def sum_parts(sums: LossSums) -> Parts:
    """The sums of `head_loss` by name."""
    values = sums._asdict()
    return Parts(maxima={"largest_logit": values.pop("largest_logit")}, sums=values)


def mean_metrics(parts: Parts, z_loss_weight: float) -> dict[str, Array]:
    """Sums over valid targets -> means: loss and its parts, accuracy; and the number of targets."""
    sums = LossSums(**parts.sums, **parts.maxima)
    total = jnp.maximum(sums.tokens, 1.0)
    return {
        "loss": (sums.cross_entropy + z_loss_weight * sums.max_z) / total,
        "cross_entropy": sums.cross_entropy / total,
        "max_z": sums.max_z / total,
        "max_logit": sums.max_logit / total,
        "largest_logit": sums.largest_logit,
        "accuracy": sums.correct / total,
        "tokens": sums.tokens,
    }


def head_norms(params: Params) -> dict[str, Array]:
    """fp32 scalars: norms of the head's rows before NormHead."""
    squares_V = jnp.sum(jnp.square(params["lm_head"]["weight"]), axis=-1)
    return {
        "head_row_norm_min": jnp.sqrt(jnp.min(squares_V)),
        "head_row_norm_max": jnp.sqrt(jnp.max(squares_V)),
        "head_row_norm_mean": jnp.mean(jnp.sqrt(squares_V)),
    }


def keep_tokenizer(workdir: Path, tokenizer: str, sha256: str, step: int) -> None:
    """Copies the run's tokenizer to its folder, atomically; renames a different one that is already there."""
    kept = workdir / TOKENIZER_NAME
    if kept.is_file():
        if file_sha256(kept) == sha256:
            return
        kept.rename(workdir / f"tokenizer_until_step_{step}.model")
    with replaced(kept) as partial:
        shutil.copyfile(tokenizer, partial)
