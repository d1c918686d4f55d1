"""Losses of preferences between answers, of each pair: of a policy beside its reference, and of a reward model.

Names as in the papers: s is the logistic function, r of an answer how much more likely the policy makes it than the
reference does (difference of log-probabilities, nats), d = r(chosen) - r(rejected).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from bc2_jax.validation import require

LOSSES = ("sigmoid", "cdpo", "robust", "ipo", "ipo_mean", "hinge", "sigmoid_norm")
"""Of `dpo_loss`."""
SMOOTHED = ("cdpo", "robust")
"""Those that have a label smoothing."""
PER_TOKEN = ("ipo_mean", "sigmoid_norm")
"""Those of means over the tokens of each answer: they need lengths."""


def dpo_loss(
    policy_chosen: ArrayLike, policy_rejected: ArrayLike, reference_chosen: ArrayLike, reference_rejected: ArrayLike, *,
    loss: str, beta: float, label_smoothing: float = 0, chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
) -> Array:  # fmt: skip
    """The loss of each pair, from the log-probabilities of its answers: sums over their tokens, eos included.

    All arrays have one shape, [P] as a rule, and so has the result, in fp32 (fp64 for fp64). With e = label_smoothing
    and a = r(chosen) / chosen_lengths - r(rejected) / rejected_lengths it is

        sigmoid       -log s(beta d)                                            DPO, arXiv 2305.18290
        cdpo          -(1 - e) log s(beta d) - e log s(-beta d)                 conservative DPO, its authors' note
        robust        (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)   arXiv 2403.00409
        ipo           (d - 1 / (2 beta))^2                                      IPO, arXiv 2310.12036, of sums
        ipo_mean      (a - 1 / (2 beta))^2                                      IPO of means over tokens, as TRL
        hinge         max(0, 1 - beta d)                                        SLiC, arXiv 2305.10425, of d
        sigmoid_norm  -log s(beta a)                                            DPO of means over tokens

    Raises ValueError, naming the argument, for another loss, for one of means without lengths, for beta <= 0, for a
    label smoothing outside [0, 0.5) or of a loss that has none, and for arrays of different shapes.
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

    Bradley and Terry's model as in InstructGPT (arXiv 2203.02155), with the margin of LLaMA 2 (arXiv 2307.09288), a
    number or [P]; centring holds rewards, which are known up to a constant only, around 0 (arXiv 2312.09244). Raises
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
    """The loss of several answers to each prompt: rewards [P, K], the best answer's first -> [P], in fp32.

    The mean over all K (K - 1) / 2 pairs of -log s(better - worse): every comparison of a prompt in one batch element,
    as in InstructGPT (arXiv 2203.02155). Raises ValueError for another number of dimensions and for K < 2.
    """
    rewards = _exact(rewards)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards.shape}; it must be [P, K] with at least 2 answers a prompt.")
    count = rewards.shape[1]
    losses = -jax.nn.log_sigmoid(rewards[:, :, None] - rewards[:, None, :])
    is_pair = np.triu(np.ones((count, count), bool), 1)
    return jnp.sum(jnp.where(is_pair, losses, 0), axis=(1, 2)) / is_pair.sum()


def _exact(x: ArrayLike) -> Array:
    """In fp32, or fp64 as it is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _difference(name: str, x: ArrayLike, other_name: str, other: ArrayLike) -> Array:
    x, other = _exact(x), _exact(other)
    _same_shape(name, x, other_name, other)
    return x - other


def _lengths(name: str, lengths: ArrayLike | None, loss: str, like: Array) -> Array:
    """At least 1: an answer that is not there has no tokens, and is not to give NaN to those beside it."""
    if lengths is None:
        raise ValueError(f"{name} = None is not valid: {loss} is of means over tokens and needs the number of them.")
    lengths = _exact(lengths)
    _same_shape("policy_" + name.split("_")[0], like, name, lengths)
    return jnp.maximum(lengths, 1)


def _same_shape(name: str, x: Array, other_name: str, other: Array) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{other_name} has shape {other.shape}; it must be that of {name}, {x.shape}.")
