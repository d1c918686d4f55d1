"""Group relative policy optimization (GRPO, arXiv 2402.03300): compares the answers to a prompt, without a critic.

Arrays and masks are those of `bc2_jax.align.ppo`.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array

from bc2_jax.align.ppo import TokenLoss, kl_estimates, policy_token_loss

Reduction = Literal["grpo", "dapo", "dr_grpo"]
STANDARD_DEVIATION_EPSILON = 1e-4
"""Added to the standard deviation of a group's scores."""


def group_advantages(scores: Array, group: int | Array, scale: bool = True) -> Array:
    """fp32 [B]: (score - mean of its group) / (standard deviation of its group + 1e-4).

    `scores` [B] are of whole answers. `group` is the number of consecutive answers to one prompt, or int [B], equal
    within a group. The standard deviation divides by the group's size - 1; without `scale` it is left out, as in Dr.
    GRPO (arXiv 2503.20783). A group of equal scores, or of one, gives exactly 0. Raises ValueError if `group` does not
    divide the number of scores.
    """
    s = jnp.asarray(scores).astype(jnp.float32)
    if jnp.ndim(group) == 0:
        size = int(group)
        if size < 1 or len(s) % size:
            raise ValueError(f"group = {size} is not valid: it must be positive and divide the {len(s)} scores.")
        group = jnp.arange(len(s)) // size
    group_B = jnp.asarray(group)
    same = group_B[:, None] == group_B[None, :]
    size_B = jnp.sum(same, axis=1, dtype=jnp.float32)
    # By differences, not by the mean: exactly 0 for equal scores.
    deviation_B = jnp.sum(jnp.where(same, s[:, None] - s[None, :], 0), axis=1) / size_B
    if not scale:
        return deviation_B
    squares_B = jnp.sum(jnp.where(same, jnp.square(deviation_B)[None, :], 0), axis=1)
    return deviation_B / (jnp.sqrt(squares_B / jnp.maximum(size_B - 1, 1)) + STANDARD_DEVIATION_EPSILON)


def token_loss(
    new: Array, old: Array, reference: Array, advantages: Array, mask: Array, clip: float, coefficient: Array | float
) -> TokenLoss:  # fmt: skip
    """`ppo.policy_token_loss` + coefficient * k3 of the trained policy from the reference, fp32 [B, S].

    `new`, `old`, `reference` [B, S] are log-probabilities; `advantages` [B] of whole answers, or [B, S].
    """
    advantages = jnp.asarray(advantages)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], jnp.shape(new))
    found = policy_token_loss(new, old, advantages, mask, clip)
    return found._replace(loss=found.loss + coefficient * kl_estimates(new, reference, mask).k3)


def reduce_tokens(loss: Array, mask: Array, reduction: Reduction, max_length: int) -> tuple[Array, Array]:
    """(sum, weight) of token losses [B, S], fp32 scalars. The loss of a batch is the sum of all sums over that of all
    weights.

    grpo: mean over answers of the mean over tokens (arXiv 2402.03300), without empty answers. dapo: mean over all
    tokens (arXiv 2503.14476). dr_grpo: sum over tokens / (answers * max_length), so that tokens of long and short
    answers weigh the same (arXiv 2503.20783).
    """
    mask = jnp.asarray(mask).astype(bool)
    loss = jnp.where(mask, jnp.asarray(loss).astype(jnp.float32), 0)
    length_B = jnp.sum(mask, axis=1, dtype=jnp.float32)
    weight = weight_of(length_B, reduction, max_length)
    if reduction == "grpo":
        loss = loss / jnp.maximum(length_B, 1)[:, None]
    return jnp.sum(loss), weight


def weight_of(lengths: Array, reduction: Reduction, max_length: int) -> Array:
    """The weight of `reduce_tokens`, fp32 scalar, by the lengths of answers, fp32 [...]; 0 is no answer."""
    if reduction == "dapo":
        return jnp.sum(lengths)
    return jnp.sum(lengths > 0, dtype=jnp.float32) * (1 if reduction == "grpo" else max_length)
