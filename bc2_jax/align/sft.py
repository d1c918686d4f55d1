"""Supervised fine-tuning: the loop, the loss and the rows of pre-training, from a model that is there.

What a row's targets are is in the rows (tools/prepare_chat.py). This adds which weight each has, and noise.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from bc2_jax.align.questions import answer_questions, read_questions, report, summarize
from bc2_jax.align.sft_results import check_adapter_export, make_ending, print_plan
from bc2_jax.config import TOKENIZER_OF_BASE, FineTuneConfig
from bc2_jax.convert.pretrained import find_tokenizer, load_params
from bc2_jax.data.batch import IGNORED, Batch
from bc2_jax.data.loader import describe_mixture
from bc2_jax.model.baichuan import Baichuan2, Params, abstract_params, split_model
from bc2_jax.model.lora import abstract_adapter, init_adapter, with_adapter
from bc2_jax.sharding import reshard, spec
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train import pretrain
from bc2_jax.train.checks import check_initial_model
from bc2_jax.train.health import mix
from bc2_jax.train.job import Job, Objective, Parts, Progress, StepParts, abstract_state, init_state
from bc2_jax.train.loop import RunResult, Start, run
from bc2_jax.train.loss import count_targets
from bc2_jax.train.results import show_results
from bc2_jax.validation import require

SEED = "seed"
"""Field of a training batch, uint32 [A], whole everywhere: what the noise of each accumulation step is drawn from. A
batch without it is held out, and has none."""
BASE = "base_checksum"
"""In the metadata of a checkpoint of adapters: that of the base model, in hex."""


def train(config: FineTuneConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Fine-tunes as `config` says; as `loop.run`."""
    return run(complete(config), make_job, command, started)


def complete(config: FineTuneConfig) -> FineTuneConfig:
    """`config` with the tokenizer of the base model, if it asks for that, and the steps of its `num_epochs`.

    Run and schedule end with the epochs at the latest; one is as many rows as all sources have together. Raises
    ValueError without a model to begin from, FileNotFoundError if that has no tokenizer and none is named, and as
    `make_train_loader` for rows that are not there.
    """
    require(
        config.init_from is not None, "init_from", config.init_from,
        "fine-tuning needs the base model: a PyTorch folder, a checkpoint or a run",
    )  # fmt: skip
    if config.data.tokenizer == TOKENIZER_OF_BASE:
        data = dataclasses.replace(config.data, tokenizer=str(find_tokenizer(str(config.init_from))))
        config = dataclasses.replace(config, data=data)
    if config.num_epochs is None:
        return config
    rows = sum(part.rows for part in describe_mixture(config.data, 0))
    steps = math.ceil(config.num_epochs * rows / config.data.global_batch_size)
    optimizer = dataclasses.replace(config.optimizer, decay_steps=min(config.optimizer.decay_steps, steps))
    return dataclasses.replace(config, num_steps=min(config.num_steps, steps), optimizer=optimizer)


def make_step(config: FineTuneConfig, mesh: Mesh) -> StepParts:
    """The step of a run: of all parameters, or of adapters beside the frozen base model in the compute dtype."""
    model, dtype = config.model, config.compute.dtype
    shape, sharding = (config.data.accumulation_steps,), NamedSharding(mesh, spec(None))
    seed: Batch = {SEED: jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=sharding)}  # type: ignore[dict-item]  # shapes stand in for arrays
    parts = pretrain.make_step(config, mesh)
    parts = parts._replace(
        objective=make_objective(config),
        batch=parts.batch | seed,
        complete=lambda step, batch: batch | {SEED: place_seeds(config, mesh, step)},
    )
    if not config.lora.rank:
        return parts
    return parts._replace(
        state=abstract_state(abstract_adapter(config.lora, model, mesh), parts.optimizer),
        frozen=abstract_params(model, mesh, dtype),
        flops_per_step=adapter_flops(config)[0],
        load_frozen=lambda: load_params(str(config.init_from), dtype, mesh)[0],
    )


def make_job(config: FineTuneConfig, start: Start) -> Job:
    """The run of `config`, from `complete`. Raises as `pretrain.make_job`, and ValueError if what is asked at
    evaluations is not valid, or if a run of adapters is resumed with another base model."""
    step = make_step(config, start.mesh)
    job = pretrain.make_job(config, start, step)
    tokenizer = Tokenizer(config.data.tokenizer)
    questions, build = read_questions(config, tokenizer), make_build(config)
    if config.lora.rank:
        job = _with_adapters(job, config, start, step)
    frozen = job.frozen

    def begin(workdir: Path) -> None:
        job.begin(workdir)
        print_plan(config, len(questions), start)

    def examine(number: int, params: Params, progress: Progress) -> dict[str, float] | None:
        model, most = build(params, frozen, {}), config.questions.max_new_tokens
        answers = answer_questions(model, tokenizer, questions, most, progress)
        if answers is None:
            return None
        report(answers, number, config.questions, start)
        return summarize(answers)

    def finish(checkpoint: Path, params: Params) -> None:
        ending = make_ending(config, checkpoint, params, lambda: build(params, frozen, {}), start)
        show_results(config, ending, tokenizer, start)

    return job._replace(begin=begin, finish=finish, examine=examine if questions else None)


def _with_adapters(job: Job, config: FineTuneConfig, start: Start, step: StepParts) -> Job:
    """`job` with the base model frozen, and adapters as all that is trained and saved."""
    check_initial_model(config)  # at a resume too: the checkpoint does not hold it
    check_adapter_export(start.workdir)
    frozen = step.load_frozen()
    base = f"{checksum(frozen):08x}"
    if start.metadata is not None and start.metadata.job.get(BASE) != base:
        raise ValueError(
            f"init_from = {config.init_from!r} is not valid: its parameters are not those beside which the adapters in "
            f"'{start.workdir}' were trained (checksum {base}, then {start.metadata.job.get(BASE)}); the same model "
            "in the same compute.dtype is needed."
        )
    return job._replace(
        frozen=frozen,
        init_state=lambda: init_state(
            init_adapter(config.lora, config.model, frozen, config.seed, start.mesh), step.optimizer
        ),
        flops_per_step=step.flops_per_step, flops_formula=adapter_flops(config)[1],
        metadata=job.metadata | {BASE: base},
    )  # fmt: skip


def adapter_flops(config: FineTuneConfig) -> tuple[int, str]:
    """Model FLOPs of an update of adapters, and what they are made of: frozen weights have no gradients."""
    model, data = config.model, config.data
    length = data.sequence_length
    attention = 6 * model.num_hidden_layers * model.hidden_size * length * (length + 1)
    matmuls = (model.flops_per_sequence(length) - attention) * 4 // 6
    shapes = jax.tree.leaves(abstract_adapter(config.lora, model, None))
    adapters = 6 * length * sum(math.prod(x.shape) for x in shapes)
    formula = "(4 x frozen matmul parameters + 6 x adapter parameters) x tokens + causal attention"
    return data.global_batch_size * (matmuls + adapters + attention), formula


def checksum(params: Params) -> int:
    """uint32 of all bits of the parameters, of their places and of their names, the same on every mesh."""
    return int(jax.jit(_checksum)(params))


def _checksum(params: Params) -> Array:
    total = jnp.uint32(0)
    for index, x in enumerate(jax.tree.leaves(params)):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).astype(jnp.uint32)
        while bits.ndim:  # sums of integers wrap and have no order
            places = 2 * jax.lax.broadcasted_iota(jnp.uint32, (bits.shape[-1],), 0) + 1
            bits = jnp.sum(mix(bits) * places, axis=-1, dtype=jnp.uint32)
        total = total * jnp.uint32(0x01000193) + (bits ^ jnp.uint32(index))
    return total


def place_seeds(config: FineTuneConfig, mesh: Mesh, step: int) -> Array:
    """SEED of the batch of a step: the same on every mesh, and whenever the step is done again."""
    seeds = np.random.SeedSequence((config.seed, step)).generate_state(config.data.accumulation_steps)
    sharding = NamedSharding(mesh, spec(None))
    # Explicitly, on the devices of this process: the loop runs under a transfer guard.
    shards = [jax.device_put(seeds, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(seeds.shape, sharding, shards)


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(config: FineTuneConfig) -> Objective:
    """Cross entropy of the targets, each with the weight that `config.loss_weighting` gives it."""
    by_sample, has_adapters = config.loss_weighting == "sample", config.lora.rank > 0
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

    return plain._replace(
        loss=loss, metrics=metrics,
        weight=count_samples if by_sample else plain.weight,
        norms=(lambda params: {}) if has_adapters else plain.norms,  # those of the head are of a head that is trained
    )  # fmt: skip


def make_build(config: FineTuneConfig) -> pretrain.Build:
    """What makes the model of the parameters; that of a training batch has its noise and its dropout."""
    graphdef, _, _ = split_model(config.model, config.compute)

    def build(params: Params, frozen: Params, batch: Batch) -> Baichuan2:
        module = nnx.merge(graphdef, frozen if config.lora.rank else params)
        noise_key = dropout_key = None
        if SEED in batch:
            noise_key, dropout_key = jax.random.split(jax.random.key(batch[SEED]))
        if config.lora.rank:
            module = with_adapter(module, config.lora, params, dropout_key if config.lora.dropout else None)
        if config.neftune_alpha and noise_key is not None:
            module.embed_tokens = NoisyEmbedding(
                module.embed_tokens, noise_key, config.neftune_alpha, batch["segment_ids"]
            )
        return module

    return build


class NoisyEmbedding:
    """An embedding with the noise of NEFTune (arXiv 2310.05914): uniform, up to alpha / sqrt(n * D) for a sample of n
    tokens. Other samples of a row, and padding, do not count."""

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
    """Samples of [..., B, T] that have a target, fp32 scalar; a sample is a segment of a row."""
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
    """int32 [..., B, T], whole rows: the sum of `values`, at least 0 each, over the segment that a position is in.

    A segment is what has the same id side by side.
    """
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
    """[..., B, T] with its rows uncut: they are small, and cut over the mesh along their tokens."""
    return reshard(x, *[None] * (x.ndim - 2), "batch", None)
