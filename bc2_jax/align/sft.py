"""Supervised fine-tuning on rows of conversations: pre-training from a model, with weighted targets and NEFTune noise.

The rows themselves mark their targets (tools/prepare_chat.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from bc2_jax.align import tuning
from bc2_jax.align.sft_results import make_ending, print_plan
from bc2_jax.align.tuning import SEED
from bc2_jax.config import FineTuneConfig
from bc2_jax.data.batch import IGNORED, Batch
from bc2_jax.model.baichuan import Baichuan2, Params, split_model
from bc2_jax.sharding import reshard
from bc2_jax.train import pretrain
from bc2_jax.train.job import Job, Objective, Parts, StepParts
from bc2_jax.train.loop import RunResult, Start, run
from bc2_jax.train.loss import count_targets


def train(config: FineTuneConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Runs supervised fine-tuning; as `loop.run`."""
    return run(complete(config), make_job, command, started)


def complete(config: FineTuneConfig) -> FineTuneConfig:
    """Completes `config` from the base model and the rows; as `tuning.complete`."""
    return tuning.complete(config)


def make_step(config: FineTuneConfig, mesh: Mesh) -> StepParts:
    """The training step; its batches have seeds of noise and dropout."""
    return tuning.with_seeds(tuning.make_step(config, mesh, make_objective(config)), config, mesh)


def make_job(config: FineTuneConfig, start: Start) -> Job:
    """The job of a completed `config`. Raises as `tuning.make_job`, and ValueError for invalid questions."""
    step = make_step(config, start.mesh)
    return tuning.with_answers(
        tuning.make_job(config, start, step), config, start, make_build(config),
        lambda questions: print_plan(config, questions, start),
        lambda checkpoint, params: make_ending(config, checkpoint, params, start),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(config: FineTuneConfig) -> Objective:
    """Cross entropy of the targets, weighted by `config.loss_weighting`."""
    by_sample = config.loss_weighting == "sample"
    head_loss = pretrain.make_loss(
        config.model, config.compute, make_build(config), weigh_by_sample if by_sample else None
    )
    plain = pretrain.make_objective(config.model, config.compute)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Parts]:
        value, parts = head_loss(params, frozen, batch)
        counts = {"targets": count_targets(batch["labels"]), "samples": count_samples(batch)}
        return value, parts._replace(sums=parts.sums | counts)

    def metrics(parts: Parts) -> dict[str, Array]:
        sums = dict(parts.sums)
        targets, samples = sums.pop("targets"), sums.pop("samples")
        return plain.metrics(parts._replace(sums=sums)) | {"tokens": targets, "samples": samples}

    return plain._replace(loss=loss, metrics=metrics, weight=count_samples if by_sample else plain.weight)


def make_build(config: FineTuneConfig) -> pretrain.Build:
    """(trained parameters, frozen ones, a micro-batch) -> the model, with noise and dropout if the batch has a SEED."""
    graphdef, _, _ = split_model(config.model, config.compute)

    def build(params: Params, frozen: Params, batch: Batch) -> Baichuan2:
        noise_key = dropout_key = None
        if SEED in batch:
            noise_key, dropout_key = jax.random.split(jax.random.key(batch[SEED]))
        module = tuning.merge_model(graphdef, config.lora, params, frozen, dropout_key)
        if config.neftune_alpha and noise_key is not None:
            module.embed_tokens = NoisyEmbedding(  # type: ignore[assignment]  # stands in for an Embedding
                module.embed_tokens, noise_key, config.neftune_alpha, batch["segment_ids"]
            )
        return module

    return build


class NoisyEmbedding:
    """An embedding with NEFTune noise (arXiv 2310.05914): uniform, up to alpha / sqrt(n * D) for a sample of n tokens,
    even if several samples share a row."""

    def __init__(self, embed_tokens, key: Array, alpha: float, segment_ids_BT: Array):
        self._embed, self._key, self._alpha, self._segment_ids_BT = embed_tokens, key, alpha, segment_ids_BT

    def __call__(self, input_ids_BT: Array, dtype: jnp.dtype) -> Array:
        h_BTD = self._embed(input_ids_BT, dtype)
        is_token_BT = (self._segment_ids_BT > 0).astype(jnp.int32)
        length_BT = reshard(sum_by_segment(is_token_BT, self._segment_ids_BT), "batch", "sequence")
        bound_BT = self._alpha * jax.lax.rsqrt(jnp.maximum(length_BT, 1) * jnp.float32(h_BTD.shape[-1]))
        bound_BT = jnp.where(length_BT > 0, bound_BT, 0)
        sharding = jax.typeof(h_BTD).sharding
        noise_BTD = jax.random.uniform(
            self._key, h_BTD.shape, jnp.float32, -1, 1, out_sharding=None if sharding.mesh.empty else sharding
        )
        return h_BTD + (noise_BTD * bound_BT[..., None]).astype(dtype)


def count_samples(batch: Batch) -> Array:
    """fp32 scalar: samples (segments) of [..., B, T] that have a target."""
    targets = _targets_by_segment(batch)
    segments = _whole_rows(batch["segment_ids"])
    return jnp.sum(_starts(segments) & (targets > 0), dtype=jnp.float32)


def weigh_by_sample(batch: Batch) -> Array:
    """fp32 [B, T]: 1 / the number of targets of each token's sample."""
    targets_BT = reshard(_targets_by_segment(batch), "batch", "sequence")
    return 1 / jnp.maximum(targets_BT, 1).astype(jnp.float32)


def _targets_by_segment(batch: Batch) -> Array:
    return sum_by_segment((batch["labels"] != IGNORED).astype(jnp.int32), batch["segment_ids"])


def sum_by_segment(values: Array, segment_ids: Array) -> Array:
    """int32 [..., B, T], rows not sharded: the sum of `values` >= 0 over the segment of each position, a run of equal
    ids."""
    values, segment_ids = _whole_rows(values), _whole_rows(segment_ids)
    axis = values.ndim - 1
    starts = _starts(segment_ids)
    ends = jnp.flip(_starts(jnp.flip(segment_ids, -1)), -1)
    total = jnp.cumsum(values, -1)
    before = jax.lax.cummax(jnp.where(starts, total - values, 0), axis)
    after = jax.lax.cummin(jnp.where(ends, total, jnp.iinfo(total.dtype).max), axis, reverse=True)
    return after - before


def _starts(segment_ids: Array) -> Array:
    widths = [(0, 0)] * (segment_ids.ndim - 1) + [(1, 0)]
    return segment_ids != jnp.pad(segment_ids, widths, constant_values=-1)[..., :-1]


def _whole_rows(x: Array) -> Array:
    """[..., B, T] without sharding along T."""
    return reshard(x, *[None] * (x.ndim - 2), "batch", None)
