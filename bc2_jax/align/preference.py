"""Losses of pairs of answers: of a policy and its reference (DPO and variants), and of a reward model.

Notation: s is the logistic function, r(answer) = log-probability of the policy - that of the reference, in nats,
d = r(chosen) - r(rejected).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bc2_jax.validation import require

LOSSES = ("sigmoid", "cdpo", "robust", "ipo", "ipo_mean", "hinge", "sigmoid_norm")
SMOOTHED = ("cdpo", "robust")
"""Losses with label smoothing."""
PER_TOKEN = ("ipo_mean", "sigmoid_norm")
"""Losses of means over the tokens of each answer, which need lengths."""


def dpo_loss(
    policy_chosen: ArrayLike, policy_rejected: ArrayLike, reference_chosen: ArrayLike, reference_rejected: ArrayLike, *,
    loss: str, beta: float, label_smoothing: float = 0, chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
) -> Array:  # fmt: skip
    """The loss of each pair, from the log-probabilities of its answers (sums over tokens, eos included).

    All arrays and the result, fp32 (fp64 for fp64), have one shape, usually [P]. With e = label_smoothing and
    a = r(chosen) / chosen_lengths - r(rejected) / rejected_lengths the loss is

        sigmoid       -log s(beta d)                                            DPO, arXiv 2305.18290
        cdpo          -(1 - e) log s(beta d) - e log s(-beta d)                 conservative DPO, its authors' note
        robust        (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)   arXiv 2403.00409
        ipo           (d - 1 / (2 beta))^2                                      IPO, arXiv 2310.12036, of sums
        ipo_mean      (a - 1 / (2 beta))^2                                      IPO of means over tokens, as TRL
        hinge         max(0, 1 - beta d)                                        SLiC, arXiv 2305.10425, of d
        sigmoid_norm  -log s(beta a)                                            DPO of means over tokens

    Raises ValueError, naming the argument, for an unknown loss, missing lengths, beta <= 0, a label smoothing outside
    [0, 0.5) or for a loss without it, and for arrays of different shapes.
    """
    require(loss in LOSSES, "loss", loss, f"it must be one of {', '.join(LOSSES)}")
    require(beta > 0, "beta", beta, "it must be positive")
    require(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "it must be in [0, 0.5)")
    require(
        label_smoothing == 0 or loss in SMOOTHED, "label_smoothing", label_smoothing,
        f"it must be 0 for {loss}; {' and '.join(SMOOTHED)} have it",
    )  # fmt: skip
    chosen = _difference("policy_chosen", policy_chosen, "reference_chosen", reference_chosen)
    rejected = _difference("policy_rejected", policy_rejected, "reference_rejected", reference_rejected)
    if loss in PER_TOKEN:
        chosen = chosen / _lengths("chosen_lengths", chosen_lengths, loss, chosen)
        rejected = rejected / _lengths("rejected_lengths", rejected_lengths, loss, rejected)
    _same_shape("policy_chosen", chosen, "policy_rejected", rejected)
    margin = chosen - rejected
    if loss in ("ipo", "ipo_mean"):
        return jnp.square(margin - 1 / (2 * beta))
    if loss == "hinge":
        return jax.nn.relu(1 - beta * margin)
    right, wrong = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
    if loss == "cdpo":
        return -(1 - label_smoothing) * right - label_smoothing * wrong
    if loss == "robust":
        return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return -right


def reward_loss(chosen: ArrayLike, rejected: ArrayLike, margin: ArrayLike = 0, centring: float = 0) -> Array:
    """-log s(chosen - rejected - margin) + centring (chosen + rejected)^2 of each pair of rewards, [P] in fp32.

    Bradley-Terry model as in InstructGPT (arXiv 2203.02155), with the margin of LLaMA 2 (arXiv 2307.09288), a number or
    [P]. Centring keeps rewards, which are only determined up to a constant, around 0 (arXiv 2312.09244). Raises
    ValueError for arrays of different shapes and for centring < 0.
    """
    require(centring >= 0, "centring", centring, "it must be at least 0")
    chosen, rejected, margin = _exact(chosen), _exact(rejected), _exact(margin)
    _same_shape("chosen", chosen, "rejected", rejected)
    if margin.ndim:
        _same_shape("chosen", chosen, "margin", margin)
    loss = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return loss + centring * jnp.square(chosen + rejected) if centring else loss


def ranked_loss(rewards: ArrayLike) -> Array:
    """The loss of ranked answers to each prompt: rewards [P, K], best answer first -> fp32 [P].

    The mean of -log s(better - worse) over all K (K - 1) / 2 pairs, so that a prompt is one batch element (InstructGPT,
    arXiv 2203.02155). Raises ValueError for another number of dimensions and for K < 2.
    """
    rewards = _exact(rewards)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards.shape}; it must be [P, K] with at least 2 answers a prompt.")
    count = rewards.shape[1]
    losses = -jax.nn.log_sigmoid(rewards[:, :, None] - rewards[:, None, :])
    is_pair = np.triu(np.ones((count, count), bool), 1)
    return jnp.sum(jnp.where(is_pair, losses, 0), axis=(1, 2)) / is_pair.sum()


def _exact(x: ArrayLike) -> Array:
    """To fp32, except fp64."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _difference(name: str, x: ArrayLike, other_name: str, other: ArrayLike) -> Array:
    x, other = _exact(x), _exact(other)
    _same_shape(name, x, other_name, other)
    return x - other


def _lengths(name: str, lengths: ArrayLike | None, loss: str, like: Array) -> Array:
    """At least 1: a missing answer has length 0 and must not give NaN."""
    if lengths is None:
        raise ValueError(f"{name} = None is not valid: {loss} averages over tokens and needs their number.")
    lengths = _exact(lengths)
    _same_shape("policy_" + name.split("_")[0], like, name, lengths)
    return jnp.maximum(lengths, 1)


def _same_shape(name: str, x: Array, other_name: str, other: Array) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{other_name} has shape {other.shape}; it must be that of {name}, {x.shape}.")
