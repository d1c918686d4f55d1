"""Direct preference optimization (arXiv 2305.18290) and its kin, on rows of pairs (`align/pairs.py`).

The policy is trained to prefer the chosen answer of each pair to the rejected one by more than its reference does,
which is the model that the run begins from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from bc2_jax.align import tuning
from bc2_jax.align.dpo_results import draw_preferences, print_plan
from bc2_jax.align.pair_preparation import prepare_sources
from bc2_jax.align.pairs import CHOSEN, REJECTED, branch_lengths, has_pair
from bc2_jax.align.preference import dpo_loss
from bc2_jax.align.reference import NAME, REFERENCE, answer_log_probs, find_or_compute
from bc2_jax.align.sft_results import make_ending
from bc2_jax.config import DPOConfig
from bc2_jax.convert.pretrained import load_params
from bc2_jax.data.batch import Batch, Rows, abstract_batch
from bc2_jax.data.row_values import RowValues
from bc2_jax.model.baichuan import Params
from bc2_jax.train import pretrain
from bc2_jax.train.job import Job, Objective, Parts, StepParts, TrainState, init_state
from bc2_jax.train.loop import RunResult, Start, run

PURPOSE = "preference tuning needs a chat model, which it begins from and is compared with"
CHECKSUM = "reference_checksum"
"""In the metadata of a checkpoint: that of the parameters which the run began from, in hex."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""By compute.dtype: nats a token by which the log-probabilities of answers may differ, on average, between two programs
that compute the same model."""


def train(config: DPOConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Tunes as `config` says; as `loop.run`."""
    return run(complete(config), make_job, command, started)


def complete(config: DPOConfig) -> DPOConfig:
    """`config` with what depends on the model that it begins from and on the pairs, which are packed into rows where
    its sources name files of pairs. Raises as `tuning.complete` and `prepare_sources`."""
    return tuning.complete(prepare_sources(tuning.with_tokenizer_of_base(config, PURPOSE)), PURPOSE)


Fields = Callable[[Rows], Rows]


def make_step(config: DPOConfig, mesh: Mesh, fields: Fields | None = None) -> StepParts:
    """The step of a run; its rows have the reference's log-probabilities from `fields`, or as its workdir has them."""
    places = tuning.count_places(config.data)
    kept: list[RowValues] = []

    def from_workdir(rows: Rows) -> Rows:
        if not kept:
            kept.append(RowValues.load(Path(str(config.workdir)) / NAME))
        return {REFERENCE: kept[0].lookup(rows)}

    return tuning.make_step(config, mesh, make_objective(config, places))._replace(
        batch=abstract_batch(config.data, mesh, {REFERENCE: 2 * places}), fields=fields or from_workdir
    )


def make_job(config: DPOConfig, start: Start) -> Job:
    """The run of `config`, from `complete`, with its reference computed. Raises as `tuning.make_job`, and ValueError
    for questions that are not valid, and where a deleted reference has to be computed again."""
    reference: list[RowValues] = []
    step = make_step(config, start.mesh, lambda rows: {REFERENCE: reference[0].lookup(rows)})
    places = tuning.count_places(config.data)
    job = tuning.make_job(config, start, step)
    job = tuning.with_answers(
        job, config, start, tuning.make_build(config),
        lambda questions: print_plan(config, places, questions, start),
        lambda checkpoint, params: make_ending(config, checkpoint, params, start, draw_preferences, loss="loss"),
    )  # fmt: skip
    initial = _Initial(config, start, job)
    checksum = initial.checksum()
    reference.append(find_or_compute(config, start, places, checksum, lambda: initial.load(checksum)))
    begin, is_fresh = job.begin, start.metadata is None

    def begin_with_reference(workdir: Path) -> None:
        if jax.process_index() == 0:
            reference[0].save(workdir / NAME)
        begin(workdir)

    def check(number: int, metrics: dict[str, float]) -> None:
        if is_fresh and number == 1:
            check_reference(metrics["reference_distance"], config)

    return job._replace(
        init_state=job.init_state if config.lora.rank else lambda: initial.take(step),
        begin=begin_with_reference, check=check, metadata=job.metadata | {CHECKSUM: checksum},
    )  # fmt: skip


class _Initial:
    """The model that a run begins from, read once where all of its parameters are trained: for the reference and, if
    this is the first start, as the state before the first step."""

    def __init__(self, config: DPOConfig, start: Start, job: Job):
        self._config, self._mesh, self._frozen = config, start.mesh, job.frozen
        known = job.metadata.get(tuning.BASE)
        self._known = known if start.metadata is None else start.metadata.job[CHECKSUM]
        self._is_fresh = start.metadata is None
        self._params: Params | None = None

    def checksum(self) -> str:
        """Of a run that goes on, that with which it began."""
        if self._known is None:
            self._params = self.load(None)
            self._known = f"{tuning.checksum(self._params):08x}"
        return self._known

    def load(self, checksum: str | None) -> Params:
        """Raises ValueError if the model does not have this `checksum`."""
        if self._frozen:
            return self._frozen
        if self._params is not None:
            return self._params
        params = load_params(str(self._config.init_from), "float32", self._mesh)[0]
        if checksum is not None and (found := f"{tuning.checksum(params):08x}") != checksum:
            raise ValueError(
                f"init_from = {self._config.init_from!r} is not valid: the reference's log-probabilities have to be "
                f"computed again, and its parameters are not those that the run began from (checksum {found}, then "
                f"{checksum})."
            )
        return params

    def take(self, step: StepParts) -> TrainState:
        """The state before the first step; the parameters are its own from then on."""
        params, self._params = self.load(self._known), None
        return init_state(params, step.optimizer)


def check_reference(distance: float, config: DPOConfig) -> None:
    """Raises ArithmeticError if the policy is not its reference before the first update: `distance` is that of their
    log-probabilities in the first batch, nats a token."""
    most = TOLERANCE[config.compute.dtype]
    if distance > most:
        raise ArithmeticError(
            "The policy is not its reference before the first step: the log-probabilities of answers differ by "
            f"{distance:.3g} nats a token, more than {most:g}. Those that were kept are of another model or were "
            f"computed otherwise (delete them: dpo.reference_cache = {config.dpo.reference_cache!r}), or the model "
            "does not compute the same twice."
        )


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(config: DPOConfig, most_pairs: int) -> Objective:
    """`dpo_loss` of pairs, of which a row holds at most `most_pairs`, and sft_weight times the mean cross entropy of
    the tokens of the chosen answer; every pair of a batch has the same weight."""
    options, build = config.dpo, tuning.make_build(config)

    def count_pairs(segment_ids_BT: Array) -> Array:
        return jnp.sum(has_pair(segment_ids_BT, most_pairs), dtype=jnp.float32)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Parts]:
        policy = answer_log_probs(build(params, frozen, batch), batch, most_pairs, config.compute.loss_chunk)
        reference, lengths = batch[REFERENCE].reshape(policy.shape), branch_lengths(batch, most_pairs)
        chosen, rejected = policy[..., CHOSEN], policy[..., REJECTED]
        chosen_tokens, rejected_tokens = lengths[..., CHOSEN], lengths[..., REJECTED]
        preference = dpo_loss(
            chosen, rejected, reference[..., CHOSEN], reference[..., REJECTED], loss=options.loss, beta=options.beta,
            label_smoothing=options.label_smoothing, chosen_lengths=chosen_tokens, rejected_lengths=rejected_tokens,
        )  # fmt: skip
        cross_entropy = -chosen / jnp.maximum(chosen_tokens, 1)
        losses = preference + options.sft_weight * cross_entropy if options.sft_weight else preference
        ratios = policy - reference
        better = ratios[..., CHOSEN] - ratios[..., REJECTED]
        values = {
            "pairs": jnp.ones_like(losses), "loss": losses, "preference_loss": preference,
            "accuracy": (better > 0) + 0.5 * (better == 0), "chosen_cross_entropy": cross_entropy,
            "chosen_log_prob": chosen, "rejected_log_prob": rejected, "chosen_ratio": ratios[..., CHOSEN],
            "rejected_ratio": ratios[..., REJECTED], "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens, "distance": jnp.sum(jnp.abs(ratios), axis=-1),
        }  # fmt: skip
        is_pair = has_pair(batch["segment_ids"], most_pairs)
        sums = {name: jnp.sum(jnp.where(is_pair, x, 0), dtype=jnp.float32) for name, x in values.items()}
        return sums["loss"], Parts(sums, {})

    plain = pretrain.make_objective(config.model, config.compute)
    return Objective(
        loss=loss,
        weight=lambda batch: jnp.sum(jax.vmap(count_pairs)(batch["segment_ids"])),
        metrics=lambda parts: mean_metrics(parts, options.beta),
        norms=plain.norms,
        summary=lambda metrics: (
            f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, reward {metrics['chosen_reward']:.3f} "
            f"chosen, {metrics['rejected_reward']:.3f} rejected"
        ),
    )


def mean_metrics(parts: Parts, beta: float) -> dict[str, Array]:
    """Sums over pairs -> means over pairs; a reward is beta times how much more likely the policy makes an answer than
    the reference, `chosen_log_ratio` and `reference_distance` are means over tokens."""
    sums = dict(parts.sums)
    pairs = sums.pop("pairs")
    total = jnp.maximum(pairs, 1.0)
    tokens = sums["chosen_tokens"] + sums["rejected_tokens"]
    chosen, rejected, distance = (sums.pop(name) for name in ("chosen_ratio", "rejected_ratio", "distance"))
    return {name: x / total for name, x in sums.items()} | {
        "chosen_reward": beta * chosen / total,
        "rejected_reward": beta * rejected / total,
        "reward_margin": beta * (chosen - rejected) / total,
        "chosen_log_ratio": chosen / jnp.maximum(sums["chosen_tokens"], 1.0),
        "reference_distance": distance / jnp.maximum(tokens, 1.0),
        "pairs": pairs,
        "tokens": tokens,
    }
