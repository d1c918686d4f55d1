"""Training of reward models (InstructGPT, arXiv 2203.02155) on rows of pairs (`align/pairs.py`).

The reward of an answer is the value at its last token, its eos.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from bc2_jax.align import pairs, tuning
from bc2_jax.align.pair_preparation import prepare_sources
from bc2_jax.align.pair_results import make_reward_ending, print_reward_plan
from bc2_jax.align.preference import reward_loss
from bc2_jax.align.row_preparation import MARGINS
from bc2_jax.align.tuning import SEED
from bc2_jax.config import RewardConfig
from bc2_jax.convert.pretrained import find_any_model
from bc2_jax.convert.reward import ADAPTER, load_backbone, load_reward_model, load_score
from bc2_jax.data.batch import Batch, Rows, abstract_batch
from bc2_jax.data.corpus import list_parts
from bc2_jax.data.row_values import RowValues
from bc2_jax.model.baichuan import Params
from bc2_jax.model.lora import abstract_adapter, init_adapter
from bc2_jax.model.reward import (
    SCORE,
    RewardModel,
    abstract_reward_params,
    backbone_of,
    init_score,
    reward_params_from,
    split_reward_model,
)
from bc2_jax.train import pretrain
from bc2_jax.train.job import Job, Objective, Parts, StepParts, abstract_state, init_state
from bc2_jax.train.loop import RunResult, Start, run
from bc2_jax.train.results import end_run
from bc2_jax.validation import require

PURPOSE = "a reward model starts from a chat or base model, or an earlier reward model"
MARGIN = "margin"
"""Field of a batch, fp32 [A, B, P]: the wanted difference of the rewards of each pair."""
_SUMMED = ("loss", "pairs", "right", "chosen", "rejected", "chosen_square", "rejected_square", "square", "asked")


def train(config: RewardConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Trains a reward model; as `loop.run`."""
    return run(complete(config), make_job, command, started)


def complete(config: RewardConfig) -> RewardConfig:
    """Packs files of pairs into rows and completes `config` from the model and the rows. Raises as `tuning.complete`
    and `prepare_sources`, and ValueError for options of language models."""
    for field, value, none in (
        ("sample.prompts", config.sample.prompts, ()), ("ngram_baselines", config.ngram_baselines, False),
        ("evaluate.tasks", config.evaluate.tasks, ()),
    ):  # fmt: skip
        require(value == none, field, value, f"it must be {none!r}: a reward model scores answers and writes no text")
    require(
        not config.export_hf or config.model.position_embedding == "rope", "export_hf", config.export_hf,
        "it must be False for a model with ALiBi, which LlamaForSequenceClassification does not have",
    )  # fmt: skip
    return tuning.complete(prepare_sources(tuning.with_tokenizer_of_base(config, PURPOSE)), PURPOSE)


def make_step(config: RewardConfig, mesh: Mesh) -> StepParts:
    """The training step: of all parameters, or of adapters and the score beside a frozen backbone."""
    places = tuning.count_places(config.data)
    parts = tuning.make_step(config, mesh, make_objective(config, places))
    model, dtype = config.model, config.compute.dtype
    head = 2 * model.vocab_size * model.hidden_size * config.data.sequence_length * config.data.global_batch_size
    abstract = abstract_reward_params(model, mesh)
    parts = parts._replace(
        state=abstract_state(abstract, parts.optimizer),
        flops_per_step=parts.flops_per_step - (2 if config.lora.rank else 3) * head,  # there is no head
    )
    if config.reward.use_margins:
        fields = find_margins(config, places)
        parts = parts._replace(batch=abstract_batch(config.data, mesh, {MARGIN: places}), fields=fields)
    if not config.lora.rank:
        return parts
    trained = {ADAPTER: abstract_adapter(config.lora, model, mesh), SCORE: abstract[SCORE]}
    parts = parts._replace(
        state=abstract_state(trained, parts.optimizer),
        frozen=backbone_of(abstract_reward_params(model, mesh, dtype)),
        load_frozen=lambda: load_backbone(str(config.init_from), dtype, mesh)[0],
    )
    return tuning.with_seeds(parts, config, mesh) if config.lora.dropout else parts


def find_margins(config: RewardConfig, places: int) -> Callable[[Rows], Rows]:
    """`StepParts.fields`: MARGIN of rows, from the files beside the rows; 0 if unknown."""

    @functools.cache
    def kept() -> list[RowValues]:  # when needed: a step may be compiled before its rows exist
        folders = [part.path for source in config.data.sources for part in list_parts(source.path)]
        paths = [folder / MARGINS for folder in dict.fromkeys(folders)]
        return [RowValues.load(path) for path in paths if path.is_file()]

    def fields(rows: Rows) -> Rows:
        margins = np.zeros((len(rows["input_ids"]), places), np.float32)
        for values in kept():
            found, missing = values.find(rows)
            margins[~missing, : values.width] = found[~missing]
        return {MARGIN: margins}

    return fields


def make_job(config: RewardConfig, start: Start) -> Job:
    """The job of a completed `config`. Raises as `pretrain.make_job`, and ValueError if adapters are resumed with
    another base model."""
    step = make_step(config, start.mesh)
    job = pretrain.make_job(config, start, step)
    if config.lora.rank:
        frozen, base = tuning.load_base(config, start, step.load_frozen)
        job = job._replace(
            frozen=frozen, metadata=job.metadata | base, flops_per_step=step.flops_per_step,
            flops_formula=tuning.ADAPTER_FLOPS,
        )  # fmt: skip

    def begin(workdir: Path) -> None:
        job.begin(workdir)
        print_reward_plan(config, tuning.count_places(config.data), start)

    return job._replace(
        init_state=lambda: init_state(init_trained(config, job.frozen, start.mesh), step.optimizer),
        begin=begin,
        finish=lambda checkpoint, params: end_run(make_reward_ending(config, checkpoint, start), start),
        language_model=None,
    )


def init_trained(config: RewardConfig, frozen: Params, mesh: Mesh) -> Params:
    """Initial trained parameters: the model `config.init_from` in fp32, with a new score if it is a language model; or
    new adapters beside `frozen`, and a score."""
    base, model = str(config.init_from), config.model
    is_reward_model = find_any_model(base).is_reward_model
    if not config.lora.rank:
        load = load_reward_model if is_reward_model else load_backbone
        params = load(base, "float32", mesh)[0]
        return reward_params_from(params, model, config.seed, mesh)
    score = load_score(base, mesh) if is_reward_model else init_score(model, config.seed, mesh)
    return {ADAPTER: init_adapter(config.lora, model, frozen, config.seed, mesh), SCORE: score}


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(config: RewardConfig, most_pairs: int) -> Objective:
    """Mean `reward_loss` over pairs; a row holds at most `most_pairs`."""
    centring, build = config.reward.centring, make_build(config)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Parts]:
        segments_BT = batch["segment_ids"]
        values_BT = build(params, frozen, batch).values(batch["input_ids"], batch["positions"], segments_BT)
        rewards = pairs.branch_last(values_BT, segments_BT, most_pairs)
        chosen, rejected = pairs.split_answers(rewards)
        counts = pairs.has_pair(segments_BT, most_pairs)
        margin = batch[MARGIN] if MARGIN in batch else jnp.zeros_like(chosen)
        losses = reward_loss(chosen, rejected, margin, centring)
        values = {
            "loss": losses, "right": (chosen > rejected) + 0.5 * (chosen == rejected),
            "chosen": chosen, "rejected": rejected, "chosen_square": chosen**2, "rejected_square": rejected**2,
            "square": (chosen - rejected) ** 2, "asked": margin,
        }  # fmt: skip
        sums = pairs.sum_over_pairs(values, counts)
        largest = jnp.max(jnp.where(counts[..., None], jnp.abs(rewards), 0))
        return sums["loss"], Parts(sums, {"largest_reward": largest})

    return Objective(
        loss=loss,
        weight=lambda batch: pairs.count_pairs(batch, most_pairs),
        metrics=mean_metrics,
        summary=pairs.summarize_pairs,
    )


def mean_metrics(parts: Parts) -> dict[str, Array]:
    """Sums over pairs -> metrics: means and standard deviations of rewards and of the margin between the two."""
    total = jnp.maximum(parts.sums["pairs"], 1.0)
    means = {name: parts.sums[name] / total for name in _SUMMED}
    margin, mean = means["chosen"] - means["rejected"], (means["chosen"] + means["rejected"]) / 2

    def spread(square: Array, mean: Array) -> Array:
        return jnp.sqrt(jnp.maximum(square - mean**2, 0))

    return {
        "loss": means["loss"],
        "accuracy": means["right"],
        "chosen_reward": means["chosen"],
        "rejected_reward": means["rejected"],
        "chosen_reward_std": spread(means["chosen_square"], means["chosen"]),
        "rejected_reward_std": spread(means["rejected_square"], means["rejected"]),
        "reward_margin": margin,
        "reward_margin_std": spread(means["square"], margin),
        "reward_mean": mean,
        "reward_std": spread((means["chosen_square"] + means["rejected_square"]) / 2, mean),
        "margin_asked": means["asked"],
        "pairs": parts.sums["pairs"],
        "largest_reward": parts.maxima["largest_reward"],
    }


def make_build(config: RewardConfig) -> Callable[[Params, Params, Batch], RewardModel]:
    """(trained parameters, frozen ones, a micro-batch) -> the reward model, with dropout if the batch has a SEED."""
    graphdef, _, _ = split_reward_model(config.model, config.compute)

    def build(params: Params, frozen: Params, batch: Batch) -> RewardModel:
        key = jax.random.key(batch[SEED]) if SEED in batch else None
        return tuning.merge_reward_model(graphdef, config.lora, params, frozen, key)

    return build
