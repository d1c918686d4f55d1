"""Scores and log-probabilities of answers -> advantages, returns and health metrics."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.align import ppo as formulas
from bc2_jax.align.grpo import group_advantages
from bc2_jax.config import PPOConfig
from bc2_jax.sharding import from_host, to_host

if TYPE_CHECKING:
    from bc2_jax.align.experience import Answers, Scores

OLD, REFERENCE, ADVANTAGE, VALUE, RETURN = "old_log_probs", "reference_log_probs", "advantages", "old_values", "returns"
"""Fields of a batch, fp32 [U * A, B, T], of the label of each position; 0 where that is IGNORED."""
UPDATE, COEFFICIENT = "update", "kl_coefficient"
"""Fields of a batch, [U * A]: the number of the update in its iteration, int32, and the KL coefficient, fp32."""


def fields_of(config: PPOConfig) -> tuple[str, ...]:
    """The fields [U * A, B, T] of a batch besides FIELDS."""
    return (OLD, ADVANTAGE, VALUE, RETURN) if config.has_critic else (OLD, ADVANTAGE, REFERENCE)


def shape(
    config: PPOConfig, mask: np.ndarray, last: np.ndarray, cut: np.ndarray, found: dict[str, np.ndarray],
    scores: np.ndarray, coefficient: float,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:  # fmt: skip
    """(the fields of `fields_of`, fp32 [N, T]; metrics) of the answers of an iteration.

    `mask` bool [N, T] is true where the label is a token of the answer, `last` int [N] the position of the last token,
    `cut` bool [N]; `found` has OLD, REFERENCE and, for PPO, VALUE, fp32 [N, T]; `scores` fp32 [N]. Every process
    computes the same, on any mesh.
    """
    arrays = from_host({**found, "mask": mask, "last": last, "cut": cut, "scores": scores})
    made, metrics = _shape(arrays, from_host(np.float32(coefficient)), config=config)
    fields = {name: to_host(x) for name, x in made.items()}
    return fields, {name: float(to_host(x)) for name, x in metrics.items()}


@functools.partial(jax.jit, static_argnames="config")
def _shape(x: dict[str, Array], coefficient: Array, *, config: PPOConfig) -> tuple[dict[str, Array], dict[str, Array]]:
    mask = x["mask"]
    real = {name: jnp.where(mask, x[name], 0) for name in (OLD, REFERENCE)}
    if not config.has_critic:
        scaled = group_advantages(x["scores"], config.answers_per_prompt, scale=config.reduction != "dr_grpo")
        return real | {ADVANTAGE: jnp.where(mask, scaled[:, None], 0)}, {}
    kl = getattr(formulas.kl_estimates(x[OLD], x[REFERENCE], mask), config.kl_estimator)
    rewards = formulas.shape_rewards(x["scores"], kl, mask, coefficient)
    after = None
    if config.bootstrap_cut:
        rows = jnp.arange(len(x["last"]))
        after = jnp.where(x["cut"], x[VALUE][rows, x["last"]], 0)
    found, returns = formulas.advantages(rewards, x[VALUE], mask, config.gamma, config.lam, after)
    fields = {
        OLD: real[OLD], ADVANTAGE: formulas.whiten(found, mask), VALUE: jnp.where(mask, x[VALUE], 0), RETURN: returns,
    }  # fmt: skip
    metrics = {
        "explained_variance": formulas.explained_variance(x[VALUE], returns, mask),
        "return_mean": formulas.token_mean(returns, mask), "value_mean": formulas.token_mean(x[VALUE], mask),
    }  # fmt: skip
    return fields, metrics


def measure(config: PPOConfig, answers: Answers, scores: Scores, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Health metrics of an iteration before its updates; entropy is estimated from the sampled tokens (mean -log p)."""
    mask, count = answers.mask, max(int(answers.mask.sum()), 1)
    old, reference, sampled = (np.where(mask, x, 0).astype(np.float64) for x in (
        found[OLD], found[REFERENCE], answers.sampled))  # fmt: skip
    k1 = old - reference
    with np.errstate(over="ignore"):  # `Checks` reports an infinite KL
        k3 = np.expm1(-k1) + k1
    total = scores.total.astype(np.float64)
    groups = scores.total.reshape(-1, config.answers_per_prompt)
    if not config.has_critic or config.answers_per_prompt > 1:
        equal = float(np.mean(groups.max(1) == groups.min(1)))
    else:  # without groups, all are compared
        equal = float(scores.total.max() == scores.total.min())
    distance = np.abs(sampled - old)
    return {
        "reward": float(total.mean()), "reward_deviation": float(total.std()),
        **{f"reward_{name}": float(part.mean(dtype=np.float64)) for name, part in scores.parts.items()},
        "kl": float(k1.sum() / count), "kl_k3": float(k3.sum() / count),
        "kl_per_answer": float(k1.sum(1).mean()), "reference_distance": float(np.abs(k1).sum() / count),
        "entropy": float(-old.sum() / count),
        "answer_tokens": float(answers.tokens.mean()), "answer_tokens_longest": float(answers.tokens.max()),
        "share_cut": float(answers.cut.mean()), "groups_equal": equal,
        "length_reward_correlation": _correlation(answers.tokens, total),
        "sampler_distance": float(distance.sum() / count), "sampler_distance_largest": float(distance.max()),
    }  # fmt: skip


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 if one of them is constant."""
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class RunningScores:
    """Count, mean and squared deviations of all scores of a run."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def state(self) -> list[Any]:
        """JSON values that restore it bit for bit."""
        return [self.count, self.mean, self.squares]

    def updated(self, scores: np.ndarray) -> RunningScores:
        """Includes the scores of another iteration, in double precision (Chan et al. 1983)."""
        x = scores.astype(np.float64)
        count, mean = self.count + len(x), float(x.mean())
        change = mean - self.mean
        squares = self.squares + float(((x - mean) ** 2).sum()) + change**2 * self.count * len(x) / count
        return RunningScores(count, self.mean + change * len(x) / count, squares)

    def normalized(self, scores: np.ndarray) -> np.ndarray:
        """fp32: (scores - mean) / standard deviation, if that is not 0."""
        deviation = (self.squares / max(self.count - 1, 1)) ** 0.5
        return ((scores - self.mean) / (deviation or 1.0)).astype(np.float32)


def coefficient_of(config: PPOConfig, iteration: int, before: float) -> float:
    """The KL coefficient of an iteration (from 0); `before` is the controller's."""
    if config.kl_schedule == "adaptive":
        return before
    return formulas.scheduled_coefficient(
        config.kl_schedule, config.kl_start, config.kl_end, iteration, config.kl_steps
    )


def adapt(config: PPOConfig, coefficient: float, kl_per_answer: float) -> float:
    """The controller's coefficient after an iteration; unchanged unless kl_schedule is adaptive."""
    if config.kl_schedule != "adaptive":
        return coefficient
    return formulas.adapted_coefficient(coefficient, kl_per_answer, config.kl_target, config.answers, config.kl_horizon)
