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
from bc2_jax.data.row_batches import RowBatches, ValidationBatches, next_row
from bc2_jax.data.row_order import changed_row_order, record_row_order
from bc2_jax.model.baichuan import Params, abstract_params, init_params, split_model
from bc2_jax.tokenizer import Tokenizer, file_sha256
from bc2_jax.train.job import Job, Objective, Parts, TrainState, abstract_state, init_state
from bc2_jax.train.loop import RunResult, Start, run
from bc2_jax.train.loss import LossSums, count_targets, head_loss
from bc2_jax.train.optimizer import Optimizer, make_optimizer
from bc2_jax.train.results import make_baselines, print_mixture, print_tables, show_results
from bc2_jax.train.resume import Change, list_changes, print_changes
from bc2_jax.validation import require

_log = logging.getLogger(__name__)


def train(config: TrainConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Pre-trains as `config` says; as `loop.run`."""
    return run(config, make_job, command, started)


def make_job(config: TrainConfig, start: Start) -> Job:
    """The run of `config`. Raises ValueError or FileNotFoundError, naming the field, for one that cannot start."""
    changes: list[Change] = []
    if start.metadata is None:
        check_initial_model(config)
    else:
        changes = list_changes(config, start.metadata)
        check_same_model(config, start.metadata, start.workdir)
        warn_of_other_rows(config, start.metadata, start.step)
    tokenizer = Tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    tokenizer_sha256 = file_sha256(config.data.tokenizer)
    check_same_tokenizer(config, start, tokenizer_sha256)
    check_samples(config, tokenizer)
    bad_rows = BadRows(config.data.max_bad_rows)
    row = 0 if start.metadata is None else next_row(start.metadata.data, config.data.sequence_length)
    num_rows = row + (config.num_steps - start.step) * config.data.global_batch_size
    optimizer = make_optimizer(config.optimizer)
    baselines: dict[str, float] = {}

    def init() -> TrainState:
        if config.init_from is None:
            return init_state(init_params(config.model, config.seed, start.mesh), optimizer)
        # In fp32, each device reading its own part.
        return init_state(load_params(config.init_from, "float32", start.mesh)[0], optimizer)

    def begin(workdir: Path) -> None:
        if jax.process_index() == 0:
            keep_tokenizer(workdir, config.data.tokenizer, tokenizer_sha256, start.step)
        print_tables(start.console, config, start.mesh)
        print_mixture(start.console, config, start.step, row, num_rows)
        print_changes(start.console, changes)
        if config.ngram_baselines and jax.process_index() == 0:
            baselines.update(make_baselines(config, start.console))
        if start.metadata is None and config.init_from is not None:
            start.say(f"Parameters from {config.init_from}.")

    return Job(
        objective=make_objective(config.model, config.compute),
        optimizer=optimizer,
        abstract_state=make_abstract_state(config, start.mesh, optimizer),
        init_state=init,
        batches=RowBatches(config.data, start.mesh, bad_rows, num_rows),
        validation=ValidationBatches(config.data, start.mesh, bad_rows),
        begin=begin,
        finish=lambda checkpoint, params: show_results(config, checkpoint, params, baselines, tokenizer, start),
        flops_per_step=flops_per_step(config),
        metadata={"row_order": record_row_order(config.data), "tokenizer_sha256": tokenizer_sha256},
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
    saved = _with_free_fields(parse_model_config({"config": metadata.config}, workdir), config.model)
    if lines := differing_fields(config.model, saved):
        raise ValueError(
            f"model is not that of the checkpoints in '{workdir}'; these fields differ (now against then): "
            + "; ".join(lines) + "."
        )  # fmt: skip


def _with_free_fields(found: ModelConfig, model: ModelConfig) -> ModelConfig:
    """`found` with what says how to train or how far to go, and so is the run's to choose, as in `model`."""
    free = {name: getattr(model, name) for name in ("z_loss_weight", "initializer_range", "model_max_length")}
    return dataclasses.replace(found, **free)


def warn_of_other_rows(config: TrainConfig, metadata: Metadata, step: int) -> None:
    """Logs which fields make a run that goes on from a checkpoint read other rows than it would have read."""
    recorded = metadata.job.get("row_order")
    if jax.process_index() != 0 or recorded is None:
        return
    if names := changed_row_order(recorded, config.data, metadata.tokens):
        _log.warning(
            "The data is not that of the checkpoint of step %d, which it goes on from: %s changed. Rows that were "
            "trained on may come again, others never.", step, ", ".join(names),
        )  # fmt: skip


def check_initial_model(config: RunConfig) -> None:
    """Raises ValueError, naming the fields that differ, if `init_from` is of another architecture."""
    if config.init_from is None:
        return
    found = _with_free_fields(find_model(config.init_from).config, config.model)
    if lines := differing_fields(config.model, found, "model."):
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


def check_same_tokenizer(config: TrainConfig, start: Start, sha256: str) -> None:
    """Raises ValueError if the model that training goes on from was trained with another tokenizer than the data's,
    unless `allow_other_tokenizer` says that this is meant: its ids would stand for other text."""
    if start.metadata is not None:
        before, known = start.workdir / TOKENIZER_NAME, start.metadata.job.get("tokenizer_sha256")
    elif config.init_from is not None and (found := find_model(config.init_from).tokenizer) is not None:
        before, known = found, None
    else:
        return
    known = known or (file_sha256(before) if before.is_file() else sha256)
    if known != sha256 and not config.allow_other_tokenizer:
        raise ValueError(
            f"data.tokenizer = '{config.data.tokenizer}' is not valid: its SHA-256 is {sha256[:12]}, that of the "
            f"tokenizer which the model was trained with ({before}) is {known[:12]}, so that the same ids mean other "
            "text; if that is meant, set allow_other_tokenizer."
        )


def keep_tokenizer(workdir: Path, tokenizer: str, sha256: str, step: int) -> None:
    """Puts the run's tokenizer into its folder, whole or not at all; another one there gets a name with `step`."""
    kept = workdir / TOKENIZER_NAME
    if kept.is_file():
        if file_sha256(kept) == sha256:
            return
        kept.rename(workdir / f"tokenizer_until_step_{step}.model")
    partial = workdir / f"{TOKENIZER_NAME}.partial"
    shutil.copyfile(tokenizer, partial)
    partial.replace(kept)


def check_samples(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError for sample prompts that generation would refuse at the end of the run."""
    sample, limit = config.sample, config.model.model_max_length
    for index, prompt in enumerate(sample.prompts):
        length = len(tokenizer.encode(prompt))
        require(length > 0, f"sample.prompts.{index}", prompt, "it must have at least one token")
        require(
            length + sample.max_new_tokens <= limit, "sample.max_new_tokens", sample.max_new_tokens,
            f"with the {length} tokens of {prompt!r} it must be at most model.model_max_length = {limit}",
        )  # fmt: skip
