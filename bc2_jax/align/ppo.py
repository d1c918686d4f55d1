"""Proximal policy optimization (arXiv 1707.06347) of answers token by token, as in InstructGPT (arXiv 2203.02155).

Pure functions of arrays. Each token of an answer is an action: arrays [B, S] have a value for each new token, `mask`
[B, S] is 1 (or True) for real tokens and 0 for padding, anywhere. Everything is computed and returned in fp32. Values
at padding, even NaN and infinities, change no result and no gradient. Results at padding are 0, and so are means over
no tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

WHITENING_EPSILON = 1e-8
"""Added to the variance."""
_SMALL = 0.1
"""Log-ratio below which k3 is computed as a series, which does not cancel."""


class KLEstimates(NamedTuple):
    """Estimates of the KL divergence of the sampling policy from the reference by one sampled token (Schulman 2020,
    "Approximating KL divergence"). The means of k1 and k3 over samples of the policy are the KL, k2 is close."""

    k1: Array
    """r = log policy - log reference; may be negative."""
    k2: Array
    """r^2 / 2."""
    k3: Array
    """exp(-r) - 1 + r, never negative."""


def kl_estimates(old: Array, reference: Array, mask: Array | None = None) -> KLEstimates:
    """fp32 [B, S] each, from log-probabilities [B, S] of the sampled tokens under policy and reference; differentiable.
    Without a `mask`, padding gives arbitrary values."""
    r = _difference(old, reference, mask)
    small = jnp.abs(r) < _SMALL
    s, large = jnp.where(small, r, 0), jnp.where(small, 1, r)
    # exp(-r) - 1 + r: the first terms cancel, which leaves little of a small r in fp32.
    series = s * s * (1 / 2 - s * (1 / 6 - s * (1 / 24 - s * (1 / 120 - s * (1 / 720 - s / 5040)))))
    return KLEstimates(r, jnp.square(r) / 2, jnp.where(small, series, jnp.expm1(-large) + large))


def shape_rewards(scores: Array, kl: Array, mask: Array, coefficient: Array | float) -> Array:
    """Rewards of each token, fp32 [B, S]: -coefficient * kl, and at an answer's last real token its score as well.

    `scores` [B] are of whole answers; `kl` [B, S] is one of `kl_estimates`. The score of an empty answer is lost.
    """
    mask = _is_real(mask)
    reward = jnp.where(mask, -_float(coefficient) * _real(kl, mask), 0)
    return reward + jnp.where(_is_last(mask), _float(scores)[:, None], 0)


def advantages(
    rewards: Array, values: Array, mask: Array, gamma: float, lam: float, bootstrap: Array | None = None
) -> tuple[Array, Array]:  # fmt: skip
    """(advantages, returns), fp32 [B, S]: generalized advantage estimation (arXiv 1506.02438).

    With t + 1 the next real token: delta_t = rewards_t + gamma * values_(t+1) - values_t and A_t = delta_t + gamma *
    lam * A_(t+1); returns = A + values, before any whitening. `values` [B, S] are at the position that predicts each
    token. The value after the last token is 0, or `bootstrap` [B] for answers that were cut.
    """
    mask = _is_real(mask)
    r, v = _real(rewards, mask), _real(values, mask)
    after = jnp.zeros_like(v[:, 0]) if bootstrap is None else jnp.where(mask.any(1), _float(bootstrap), 0)

    def back(carry: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = carry
        reward, value, is_real = token
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(is_real, value, next_value), jnp.where(is_real, advantage, next_advantage)
        return carry, jnp.where(is_real, advantage, 0)

    columns = r.T, v.T, mask.T
    _, found = jax.lax.scan(back, (after, jnp.zeros_like(after)), columns, reverse=True)
    return found.T, found.T + v


def whiten(x: Array, mask: Array) -> Array:
    """fp32 [B, S]: (x - mean) / sqrt(variance + 1e-8) over all real tokens; the variance divides by their number - 1.
    A single token becomes 0."""
    mask = _is_real(mask)
    x = _real(x, mask)
    count = jnp.sum(mask, dtype=jnp.float32)
    deviation = jnp.where(mask, x - jnp.sum(x) / jnp.maximum(count, 1), 0)
    variance = jnp.sum(jnp.square(deviation)) / jnp.maximum(count - 1, 1)
    return deviation * jax.lax.rsqrt(variance + WHITENING_EPSILON)


class TokenLoss(NamedTuple):
    """fp32 [B, S], 0 at padding."""

    loss: Array
    ratio: Array
    """new / old probability; 0 for value losses."""
    clipped: Array
    """1 where the clipped term is larger, which stops the gradient."""


def policy_token_loss(new: Array, old: Array, advantages: Array, mask: Array, clip: float) -> TokenLoss:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) of each token, ratio = exp(new - old) (arXiv 1707.06347,
    equation 7). `new` and `old` [B, S] are log-probabilities under the trained policy and the one that sampled."""
    mask = _is_real(mask)
    advantage = _real(advantages, mask)
    ratio = jnp.exp(_difference(new, old, mask))
    plain, bounded = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)
    return TokenLoss(
        jnp.maximum(plain, bounded), jnp.where(mask, ratio, 0), jnp.where(mask, bounded > plain, 0).astype(jnp.float32)
    )


def value_token_loss(new: Array, old: Array, returns: Array, mask: Array, clip: float | None) -> TokenLoss:
    """max((new - R)^2, (clip(new, old - clip, old + clip) - R)^2) / 2 of each token; without a clip, the first. `new`
    and `old` [B, S] are values of the trained critic and of the one behind the `returns` [B, S]."""
    mask = _is_real(mask)
    v, target = _real(new, mask), _real(returns, mask)
    plain = jnp.square(v - target)
    if clip is None:
        return TokenLoss(plain / 2, jnp.zeros_like(v), jnp.zeros_like(v))
    before = _real(old, mask)
    bounded = jnp.square(jnp.clip(v, before - clip, before + clip) - target)
    return TokenLoss(jnp.maximum(plain, bounded) / 2, jnp.zeros_like(v), (bounded > plain).astype(jnp.float32))


def token_mean(x: Array, mask: Array) -> Array:
    """fp32 scalar: the mean of `x` [B, S] over real tokens, 0 if there are none."""
    mask = _is_real(mask)
    return jnp.sum(_real(x, mask)) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
    """fp32 scalar: 1 - var(returns - values) / var(returns) over real tokens: 1 for a perfect critic, 0 for one that
    only knows the mean, below 0 for a worse one. 0 if the returns are constant."""
    mask = _is_real(mask)

    def variance(x: Array) -> Array:
        return token_mean(jnp.square(x - token_mean(x, mask)), mask)

    total = variance(_real(returns, mask))
    left = variance(_real(returns, mask) - _real(values, mask))
    return jnp.where(total > 0, 1 - left / jnp.where(total > 0, total, 1), 0)


# --------------------------------------------------------------------------------------------------- the coefficient


def scheduled_coefficient(shape: str, start: float, end: float, step: int, steps: int) -> float:
    """The KL coefficient of iteration `step`: `start` at 0, `end` from `steps` on.

    `shape` is geometric (the same factor at each step), linear or constant (always `start`). The paper only gives 0.2
    and 0.005 (section 3.3).
    """
    share = min(step / steps, 1.0) if steps else 1.0
    if shape == "constant":
        return start
    if shape == "linear":
        return start + (end - start) * share
    return start * (end / start) ** share


def adapted_coefficient(coefficient: float, kl: float, target: float, answers: int, horizon: float) -> float:
    """The next coefficient of a controller that keeps the KL of an answer (sum over tokens) at `target` nats.

    coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * answers / horizon) (arXiv 1909.08593, section 2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)


# -------------------------------------------------------------------------------------------------------------- masks


def _float(x: Array | float) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _is_real(mask: Array) -> Array:
    return jnp.asarray(mask).astype(bool)


def _real(x: Array, mask: Array) -> Array:
    return jnp.where(mask, _float(x), 0)


def _difference(a: Array, b: Array, mask: Array | None) -> Array:
    difference = _float(a) - _float(b)
    return difference if mask is None else jnp.where(_is_real(mask), difference, 0)


def _is_last(mask: Array) -> Array:
    """bool [B, S]: the last real token of each row."""
    place = jnp.arange(1, mask.shape[1] + 1)
    return mask & (place == jnp.max(jnp.where(mask, place, 0), axis=1, keepdims=True))
