"""Shared parts of runs that start from a model and train all of its parameters, or adapters beside them.

Each kind of run adds its objective to `make_step`; its output, questions and exports to `make_job`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from bc2_jax.align.pairs import most_pairs
from bc2_jax.align.questions import find_questions, make_examine, read_questions
from bc2_jax.align.sft_results import check_adapter_export
from bc2_jax.config import TOKENIZER_OF_BASE, AskedConfig, DataConfig, LoraConfig, ModelConfig, RunConfig, TunedConfig
from bc2_jax.convert.pretrained import find_tokenizer, load_params
from bc2_jax.convert.reward import ADAPTER
from bc2_jax.data.batch import Batch
from bc2_jax.data.loader import describe_mixture
from bc2_jax.model.baichuan import Baichuan2, Params, abstract_params, split_model
from bc2_jax.model.log_probs import token_log_probs
from bc2_jax.model.lora import abstract_adapter, init_adapter, with_adapter
from bc2_jax.model.reward import SCORE, RewardModel
from bc2_jax.sharding import spec
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train import pretrain
from bc2_jax.train.checks import check_initial_model
from bc2_jax.train.health import mix
from bc2_jax.train.job import Job, Objective, StepParts, abstract_state, init_state
from bc2_jax.train.loop import Start
from bc2_jax.train.results import Ending, show_results
from bc2_jax.validation import require

Config = TypeVar("Config", bound=TunedConfig)

ADAPTER_FLOPS = "(4 x frozen matmul parameters + 6 x adapter parameters) x tokens + causal attention"
"""Formula of the model FLOPs of adapters: frozen weights have no gradients."""
BASE = "base_checksum"
"""In the metadata of a checkpoint of adapters: checksum of the base model, in hex."""
SEED = "seed"
"""Field of a training batch, uint32 [A], replicated: seed of noise and dropout of each accumulation step. Held-out
batches have none, and neither noise nor dropout."""


def complete(config: Config, purpose: str = "fine-tuning needs the base model") -> Config:
    """Fills in the tokenizer of the base model, if asked for, and the steps of `num_epochs`.

    Run and learning rate schedule end with the epochs at the latest; an epoch is as many rows as all sources have.
    Raises ValueError, with `purpose`, without `init_from`; FileNotFoundError without a tokenizer; as
    `make_train_loader` for missing rows.
    """
    config = with_tokenizer_of_base(config, purpose)
    if config.num_epochs is None:
        return config
    rows = sum(part.rows for part in describe_mixture(config.data, 0))
    steps = math.ceil(config.num_epochs * rows / config.data.global_batch_size)
    optimizer = dataclasses.replace(config.optimizer, decay_steps=min(config.optimizer.decay_steps, steps))
    return dataclasses.replace(config, num_steps=min(config.num_steps, steps), optimizer=optimizer)


def with_tokenizer_of_base(config: Config, purpose: str) -> Config:
    """Only the tokenizer part of `complete`, for runs that must pack rows before they can count them."""
    require(
        config.init_from is not None, "init_from", config.init_from,
        f"{purpose}: a PyTorch folder, a checkpoint or a run",
    )  # fmt: skip
    if config.data.tokenizer != TOKENIZER_OF_BASE:
        return config
    data = dataclasses.replace(config.data, tokenizer=str(find_tokenizer(str(config.init_from))))
    return dataclasses.replace(config, data=data)


def make_step(config: TunedConfig, mesh: Mesh, objective: Objective) -> StepParts:
    """The training step: of all parameters, or of adapters beside the frozen base model in the compute dtype."""
    model, dtype = config.model, config.compute.dtype
    parts = pretrain.make_step(config, mesh)._replace(objective=objective)
    if not config.lora.rank:
        return parts
    return parts._replace(
        objective=objective._replace(norms=lambda params: {}),  # the head is frozen
        state=abstract_state(abstract_adapter(config.lora, model, mesh), parts.optimizer),
        frozen=abstract_params(model, mesh, dtype),
        flops_per_step=adapter_flops(config),
        load_frozen=lambda: load_params(str(config.init_from), dtype, mesh)[0],
    )


def with_seeds(parts: StepParts, config: TunedConfig, mesh: Mesh) -> StepParts:
    """`parts`, with SEED in the batches."""
    shape, sharding = (config.data.accumulation_steps,), NamedSharding(mesh, spec(None))
    seed = {SEED: jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=sharding)}
    return parts._replace(
        batch=parts.batch | seed, complete=lambda step, batch: batch | {SEED: _place_seeds(config, mesh, step)}
    )


def _place_seeds(config: TunedConfig, mesh: Mesh, step: int) -> Array:
    """SEED of the batch of a step, the same on every mesh and at every repetition."""
    seeds = np.random.SeedSequence((config.seed, step)).generate_state(config.data.accumulation_steps)
    sharding = NamedSharding(mesh, spec(None))
    # Explicitly, on the devices of this process: the loop runs under a transfer guard.
    shards = [jax.device_put(seeds, device) for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(seeds.shape, sharding, shards)


def make_job(config: TunedConfig, start: Start, step: StepParts) -> Job:
    """The job of pre-training with another `step`.

    Raises as `pretrain.make_job`, and ValueError if adapters are resumed with another base model.
    """
    job = pretrain.make_job(config, start, step)
    if not config.lora.rank:
        return job
    check_adapter_export(start.workdir)
    frozen, base = load_base(config, start, step.load_frozen)
    return job._replace(
        frozen=frozen,
        init_state=lambda: init_state(
            init_adapter(config.lora, config.model, frozen, config.seed, start.mesh), step.optimizer
        ),
        flops_per_step=step.flops_per_step, flops_formula=ADAPTER_FLOPS,
        language_model=lambda params: make_build(config)(params, frozen, {}),
        metadata=job.metadata | base,
    )  # fmt: skip


def with_answers(
    job: Job, config: AskedConfig, start: Start, build: pretrain.Build, print_plan: Callable[[int], None],
    make_ending: Callable[[Path, Params], Ending],
) -> Job:  # fmt: skip
    """Adds to `job` the questions of `config` at evaluations, `print_plan(number of questions)` at the start and
    `make_ending(last checkpoint, its parameters)` at the end.

    Raises ValueError or FileNotFoundError for invalid questions.
    """
    tokenizer = Tokenizer(config.data.tokenizer)
    asked, most = config.questions, config.model.model_max_length
    questions = read_questions(find_questions(config), asked, most, tokenizer)

    def begin(workdir: Path) -> None:
        job.begin(workdir)
        print_plan(len(questions))

    def finish(checkpoint: Path, params: Params) -> None:
        ending = make_ending(checkpoint, params)
        show_results(config, ending, lambda: build(params, job.frozen, {}), tokenizer, start)

    examine = make_examine(lambda params: build(params, job.frozen, {}), tokenizer, questions, asked, start)
    return job._replace(begin=begin, finish=finish, examine=examine)


def load_base(config: RunConfig, start: Start, load: Callable[[], Params]) -> tuple[Params, dict[str, str]]:
    """(the frozen base model, metadata that identifies it in checkpoints).

    Raises ValueError if `config.init_from` has another architecture, or is not the base of the adapters to resume.
    """
    check_initial_model(config)  # at a resume too: it is not in the checkpoint
    frozen = load()
    base = f"{checksum(frozen):08x}"
    if start.metadata is not None and start.metadata.job.get(BASE) != base:
        raise ValueError(
            f"init_from = {config.init_from!r} is not valid: the adapters in '{start.workdir}' were trained with other "
            f"base parameters (checksum {base}, then {start.metadata.job.get(BASE)}); it must be the same model in the "
            "same compute.dtype."
        )
    return frozen, {BASE: base}


def make_build(config: TunedConfig) -> pretrain.Build:
    """(trained parameters, frozen ones, a micro-batch) -> the model, without noise and dropout."""
    graphdef, _, _ = split_model(config.model, config.compute)

    return lambda params, frozen, batch: merge_model(graphdef, config.lora, params, frozen)


def merge_model(
    graphdef: nnx.GraphDef, lora: LoraConfig, params: Params, frozen: Params, dropout_key: Array | None = None
) -> Baichuan2:  # fmt: skip
    """The language model of the trained parameters: all of them, or adapters beside the frozen ones. With a key
    adapters have dropout."""
    if not lora.rank:
        return nnx.merge(graphdef, params)
    return with_adapter(nnx.merge(graphdef, frozen), lora, params, dropout_key if lora.dropout else None)


def merge_reward_model(
    graphdef: nnx.GraphDef, lora: LoraConfig, params: Params, frozen: Params, dropout_key: Array | None = None
) -> RewardModel:  # fmt: skip
    """`merge_model` of a reward model, whose trained parameters are all, or {ADAPTER, SCORE}."""
    if not lora.rank:
        return nnx.merge(graphdef, params)
    return with_adapter(nnx.merge(graphdef, frozen | {SCORE: params[SCORE]}), lora, params[ADAPTER], dropout_key)


def label_log_probs(model: Baichuan2, batch: Batch, chunk: int) -> Array:
    """fp32 [B, T]: log-probabilities of the labels of a micro-batch [B, T]; 0 where they are IGNORED."""
    h_BTD = model.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
    return token_log_probs(h_BTD, model.lm_head.rows(), batch["labels"], chunk).log_prob


def count_places(data: DataConfig) -> int:
    """Most pairs in a row. Without rows, as when a step is compiled ahead of time: one per 512 tokens."""
    try:
        return most_pairs(data)
    except FileNotFoundError:
        return max(1, data.sequence_length // 512)


def adapter_flops(config: TunedConfig) -> int:
    """Model FLOPs of an update of adapters."""
    data = config.data
    return data.global_batch_size * tuned_flops_per_sequence(config.lora, config.model, data.sequence_length)


def tuned_flops_per_sequence(lora: LoraConfig, model: ModelConfig, length: int) -> int:
    """`ModelConfig.flops_per_sequence` if only adapters are trained; with rank 0, of all parameters."""
    if not lora.rank:
        return model.flops_per_sequence(length)
    attention = 6 * model.num_hidden_layers * model.hidden_size * length * (length + 1)
    matmuls = (model.flops_per_sequence(length) - attention) * 4 // 6
    shapes = jax.tree.leaves(abstract_adapter(lora, model, None))
    return matmuls + 6 * length * sum(math.prod(x.shape) for x in shapes) + attention


def checksum(params: Params) -> int:
    """uint32 hash of all bits of the parameters, their positions and order; the same on every mesh."""
    return int(jax.jit(_checksum)(params))


def _checksum(params: Params) -> Array:
    total = jnp.uint32(0)
    for index, x in enumerate(jax.tree.leaves(params)):
        x = x.astype(jnp.int8) if x.dtype == jnp.int4 else x
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        while bits.ndim:  # sums of integers wrap and have no order
            places = 2 * jax.lax.broadcasted_iota(jnp.uint32, (bits.shape[-1],), 0) + 1
            bits = jnp.sum(mix(bits) * places, axis=-1, dtype=jnp.uint32)
        total = total * jnp.uint32(0x01000193) + (bits ^ jnp.uint32(index))
    return total
