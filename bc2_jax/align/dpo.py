"""Direct preference optimization (DPO, arXiv 2305.18290) and variants, on rows of pairs (`align/pairs.py`).

The policy learns to prefer the chosen to the rejected answer of each pair more than its reference does. The reference
is the model that the run starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from bc2_jax.align import pairs, tuning
from bc2_jax.align.pair_preparation import prepare_sources
from bc2_jax.align.pair_results import print_dpo_plan, show_pairs
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

PURPOSE = "preference tuning needs a chat model, its start and its reference"
CHECKSUM = "reference_checksum"
"""In the metadata of a checkpoint: checksum of the parameters the run started from, in hex."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""By compute.dtype: largest mean difference, in nats a token, of log-probabilities that two programs compute of the
same model."""


def train(config: DPOConfig, command: str = "train.py", started: float | None = None) -> RunResult:
    """Runs DPO; as `loop.run`."""
    return run(complete(config), make_job, command, started)


def complete(config: DPOConfig) -> DPOConfig:
    """Packs files of pairs into rows and completes `config` from the model and the rows. Raises as `tuning.complete`
    and `prepare_sources`."""
    return tuning.complete(prepare_sources(tuning.with_tokenizer_of_base(config, PURPOSE)), PURPOSE)


Fields = Callable[[Rows], Rows]


def make_step(config: DPOConfig, mesh: Mesh, fields: Fields | None = None) -> StepParts:
    """The training step. `fields` gives the reference's log-probabilities of rows, by default from the workdir."""
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
    """The job of a completed `config`; computes the reference first. Raises as `tuning.make_job`, and ValueError for
    invalid questions and if a lost reference can't be computed again."""
    reference: list[RowValues] = []
    step = make_step(config, start.mesh, lambda rows: {REFERENCE: reference[0].lookup(rows)})
    places = tuning.count_places(config.data)
    job = tuning.make_job(config, start, step)
    job = tuning.with_answers(
        job, config, start, tuning.make_build(config),
        lambda questions: print_dpo_plan(config, places, questions, start),
        lambda checkpoint, params: make_ending(config, checkpoint, params, start, show_pairs, loss="loss"),
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
    """The model that a run starts from, as reference and as initial state. If all parameters are trained it is read
    only once for both."""

    def __init__(self, config: DPOConfig, start: Start, job: Job):
        self._config, self._mesh, self._frozen = config, start.mesh, job.frozen
        known = job.metadata.get(tuning.BASE)
        self._known = known if start.metadata is None else start.metadata.job[CHECKSUM]
        self._params: Params | None = None

    def checksum(self) -> str:
        """Checksum of the parameters that the run originally started from."""
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
                f"init_from = {self._config.init_from!r} is not valid: the reference's log-probabilities must be "
                f"computed again, but the run started from another model (checksum {found}, then {checksum})."
            )
        return params

    def take(self, step: StepParts) -> TrainState:
        """The state before the first step, which takes over the parameters."""
        params, self._params = self.load(self._known), None
        return init_state(params, step.optimizer)


def check_reference(distance: float, config: DPOConfig) -> None:
    """Raises ArithmeticError if policy and reference differ before the first update. `distance` is the mean difference
    of their log-probabilities in the first batch, nats a token."""
    most = TOLERANCE[config.compute.dtype]
    if distance > most:
        raise ArithmeticError(
            "The policy is not its reference before the first step: the log-probabilities of answers differ by "
            f"{distance:.3g} nats a token, more than {most:g}. Either the cached ones are wrong (delete them: "
            f"dpo.reference_cache = {config.dpo.reference_cache!r}), or the model is not deterministic."
        )


# ----------------------------------------------------------------------------------------------------------- objective


def make_objective(config: DPOConfig, most_pairs: int) -> Objective:
    """Mean over pairs of `dpo_loss` + sft_weight * mean cross entropy of the tokens of the chosen answer. A row holds
    at most `most_pairs` pairs."""
    options, build = config.dpo, tuning.make_build(config)

    def loss(params: Params, frozen: Params, batch: Batch) -> tuple[Array, Parts]:
        policy = answer_log_probs(build(params, frozen, batch), batch, most_pairs, config.compute.loss_chunk)
        reference = batch[REFERENCE].reshape(policy.shape)
        ratios = policy - reference
        chosen, rejected = pairs.split_answers(policy)
        chosen_ratio, rejected_ratio = pairs.split_answers(ratios)
        chosen_tokens, rejected_tokens = pairs.split_answers(pairs.branch_lengths(batch, most_pairs))
        preference = dpo_loss(
            chosen, rejected, *pairs.split_answers(reference), loss=options.loss, beta=options.beta,
            label_smoothing=options.label_smoothing, chosen_lengths=chosen_tokens, rejected_lengths=rejected_tokens,
        )  # fmt: skip
        cross_entropy = -chosen / jnp.maximum(chosen_tokens, 1)
        losses = preference + options.sft_weight * cross_entropy if options.sft_weight else preference
        better = chosen_ratio - rejected_ratio
        values = {
            "loss": losses, "preference_loss": preference, "accuracy": (better > 0) + 0.5 * (better == 0),
            "chosen_cross_entropy": cross_entropy, "chosen_log_prob": chosen, "rejected_log_prob": rejected,
            "chosen_ratio": chosen_ratio, "rejected_ratio": rejected_ratio, "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens, "distance": jnp.sum(jnp.abs(ratios), axis=-1),
        }  # fmt: skip
        sums = pairs.sum_over_pairs(values, pairs.has_pair(batch["segment_ids"], most_pairs))
        return sums["loss"], Parts(sums, {})

    plain = pretrain.make_objective(config.model, config.compute)
    return Objective(
        loss=loss,
        weight=lambda batch: pairs.count_pairs(batch, most_pairs),
        metrics=lambda parts: mean_metrics(parts, options.beta),
        norms=plain.norms,
        summary=pairs.summarize_pairs,
    )


def mean_metrics(parts: Parts, beta: float) -> dict[str, Array]:
    """Sums over pairs -> metrics: means over pairs, but `chosen_log_ratio` and `reference_distance` are means over
    tokens. A reward is beta * (log-probability of the policy - that of the reference)."""
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
