"""Pre-training (paper section 2.4): the next token of packed rows of text. `make_job` is all that it adds to a run."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from bc2_jax.checkpoint import TOKENIZER_NAME, Metadata, parse_model_config
from bc2_jax.config import ComputeConfig, ModelConfig, RunConfig, TrainConfig, differing_fields
from bc2_jax.convert.pretrained import find_model, load_params
from bc2_jax.data.bad_rows import BadRows
from bc2_jax.data.batch import Batch
from bc2_jax.data.row_batches import RowBatches, ValidationBatches
from bc2_jax.data.row_order import changed_row_order, record_row_order
from bc2_jax.model.baichuan import Params, abstract_params, init_params, split_model
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.job import Job, Objective, Parts, TrainState, abstract_state, init_state
from bc2_jax.train.loop import RunResult, Start, run
from bc2_jax.train.loss import LossSums, count_targets, head_loss
from bc2_jax.train.optimizer import Optimizer, make_optimizer
from bc2_jax.train.results import make_baselines, print_mixture, print_tables, show_results

_log = logging.getLogger(__name__)


def train(config: TrainConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Pre-trains as `config` says; as `loop.run`."""
    return run(config, make_job, command, started)


def make_job(config: TrainConfig, start: Start) -> Job:
    """The run of `config`. Raises ValueError or FileNotFoundError, naming the field, for one that cannot start."""
    if start.metadata is None:
        check_initial_model(config)
    else:
        check_same_model(config, start.metadata, start.workdir)
        warn_of_other_rows(config, start.metadata, start.step)
    tokenizer = Tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    bad_rows = BadRows(config.data.max_bad_rows)
    optimizer = make_optimizer(config.optimizer)
    baselines: dict[str, float] = {}

    def init() -> TrainState:
        if config.init_from is None:
            return init_state(init_params(config.model, config.seed, start.mesh), optimizer)
        # In fp32, each device reading its own part.
        return init_state(load_params(config.init_from, "float32", start.mesh)[0], optimizer)

    def begin(workdir: Path) -> None:
        if jax.process_index() == 0 and not (workdir / TOKENIZER_NAME).exists():
            partial = workdir / f"{TOKENIZER_NAME}.partial"
            shutil.copyfile(config.data.tokenizer, partial)
            partial.replace(workdir / TOKENIZER_NAME)  # a killed run leaves it whole or not there
        print_tables(start.console, config, start.mesh)
        print_mixture(start.console, config)
        if config.ngram_baselines and jax.process_index() == 0:
            baselines.update(make_baselines(config, start.console))
        if start.metadata is None and config.init_from is not None:
            start.say(f"Parameters from {config.init_from}.")

    return Job(
        objective=make_objective(config.model, config.compute),
        optimizer=optimizer,
        abstract_state=make_abstract_state(config, start.mesh, optimizer),
        init_state=init,
        batches=RowBatches(config.data, start.mesh, config.num_steps, bad_rows),
        validation=ValidationBatches(config.data, start.mesh, bad_rows),
        begin=begin,
        finish=lambda checkpoint, params: show_results(config, checkpoint, params, baselines, tokenizer, start),
        flops_per_step=flops_per_step(config),
        metadata={"row_order": record_row_order(config.data)},
    )


def flops_per_step(config: TrainConfig) -> int:
    """Model FLOPs of one update over the whole batch."""
    return config.data.global_batch_size * config.model.flops_per_sequence(config.data.sequence_length)


def make_abstract_state(config: RunConfig, mesh: Mesh, optimizer: Optimizer) -> TrainState:
    """Shapes and shardings of the state where all parameters are trained; call it under `jax.set_mesh(mesh)`."""
    return abstract_state(abstract_params(config.model, mesh), optimizer)


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(model: ModelConfig, compute: ComputeConfig) -> Objective:
    """Cross entropy and max-z (`head_loss`) of the next token; every valid target of a batch has the same weight."""
    return Objective(
        loss=make_loss(model, compute),
        weight=lambda batch: count_targets(batch["labels"]),
        metrics=lambda parts: mean_metrics(parts, model.z_loss_weight),
        norms=head_norms,
        summary=lambda metrics: f"cross entropy {metrics['cross_entropy']:.4f}, accuracy {metrics['accuracy']:.1%}",
    )


def make_loss(model: ModelConfig, compute: ComputeConfig) -> Callable[[Params, Params, Batch], tuple[Array, Parts]]:
    """`Objective.loss`: the sum over the valid targets of a micro-batch [B, T]; all parameters are trained."""
    graphdef, _, _ = split_model(model, compute)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Parts]:
        module = nnx.merge(graphdef, params)
        h_BTD, _ = module.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
        value, sums = head_loss(h_BTD, module.lm_head.rows(), batch["labels"], model.z_loss_weight, compute.loss_chunk)
        return value, sum_parts(sums)

    return loss


def sum_parts(sums: LossSums) -> Parts:
    """What `head_loss` adds up, by name."""
    values = sums._asdict()
    return Parts(maxima={"largest_logit": values.pop("largest_logit")}, sums=values)


def mean_metrics(parts: Parts, z_loss_weight: float) -> dict[str, Array]:
    """Sums over valid targets -> means: loss and its parts, accuracy, and the number of targets."""
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
    """fp32 scalars: norms of the head's rows, before NormHead makes them one."""
    squares_V = jnp.sum(jnp.square(params["lm_head"]["weight"]), axis=-1)
    return {
        "head_row_norm_min": jnp.sqrt(jnp.min(squares_V)),
        "head_row_norm_max": jnp.sqrt(jnp.max(squares_V)),
        "head_row_norm_mean": jnp.mean(jnp.sqrt(squares_V)),
    }


# -------------------------------------------------------------------------------------------------------------- checks


def check_same_model(config: RunConfig, metadata: Metadata, workdir: Path) -> None:
    """Raises ValueError, naming the fields that differ, if a checkpoint is of another architecture."""
    if lines := differing_fields(config.model, parse_model_config({"config": metadata.config}, workdir)):
        raise ValueError(
            f"model is not that of the checkpoints in '{workdir}'; these fields differ (now against then): "
            + "; ".join(lines) + "."
        )  # fmt: skip


def warn_of_other_rows(config: TrainConfig, metadata: Metadata, step: int) -> None:
    """Logs which fields make a run that goes on from a checkpoint read other rows than it would have read."""
    recorded = metadata.job.get("row_order")
    if jax.process_index() == 0 and recorded is not None and (names := changed_row_order(recorded, config.data, step)):
        _log.warning(
            "The data is not that of the checkpoint of step %d, which it goes on from: %s changed. Rows that were "
            "trained on may come again, others never.", step, ", ".join(names),
        )  # fmt: skip


def check_initial_model(config: RunConfig) -> None:
    """Raises ValueError, naming the fields that differ, if `init_from` is of another architecture."""
    if config.init_from is None:
        return
    found = find_model(config.init_from).config
    # What says how to train or how far to go is the run's to choose.
    chosen = {name: getattr(config.model, name) for name in ("z_loss_weight", "initializer_range", "model_max_length")}
    if lines := differing_fields(config.model, dataclasses.replace(found, **chosen), "model."):
        raise ValueError(
            f"init_from = '{config.init_from}' is of another architecture; these differ (the run's against its): "
            + "; ".join(lines) + "."
        )  # fmt: skip


def check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer can produce ids the model does not have, or ends documents with another id."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is not valid: the tokenizer {config.data.tokenizer} has "
            f"{tokenizer.vocab_size} pieces."
        )
    if tokenizer.eos_id != config.model.eos_token_id:
        raise ValueError(
            f"model.eos_token_id = {config.model.eos_token_id} is not valid: the tokenizer has {tokenizer.eos_id}."
        )
