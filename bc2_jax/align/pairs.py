"""Pairs of answers in a batch: sums, lengths and last values of each answer, and sums over all pairs.

A pair is a document whose branches 1 and 2 are the chosen and the rejected answer. Results are [B, P, 2]: the p-th pair
of each row, chosen before rejected; 0 if a row has fewer than P pairs. They are the same on any mesh, without
cancellation: no sum is a difference of running sums.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import DataConfig
from bc2_jax.data.batch import IGNORED, Batch
from bc2_jax.data.corpus import list_parts
from bc2_jax.kernels.segments import TRUNK_BITS
from bc2_jax.sharding import reshard
from bc2_jax.validation import require


def branch_sums(values_BT: Array, batch: Batch, most_pairs: int) -> Array:
    """fp32 [B, P, 2]: the sum of `values_BT` over the targets of each answer (labels that are not IGNORED)."""
    targets_BT = jnp.where(batch["labels"] != IGNORED, values_BT.astype(jnp.float32), 0)
    return _sum_each(targets_BT, batch["segment_ids"], most_pairs)


def branch_lengths(batch: Batch, most_pairs: int) -> Array:
    """fp32 [B, P, 2]: the number of targets of each answer."""
    return branch_sums(jnp.ones_like(batch["labels"], jnp.float32), batch, most_pairs)


def branch_last(values_BT: Array, segment_ids_BT: Array, most_pairs: int) -> Array:
    """fp32 [B, P, 2]: the value at the last token of each answer, its eos unless that was cut off."""
    whole_BT = reshard(segment_ids_BT, "batch", None)  # the next token may be on another device
    is_last_BT = whole_BT != jnp.pad(whole_BT, ((0, 0), (0, 1)))[:, 1:]
    is_last_BT = reshard(is_last_BT, "batch", "sequence")
    return _sum_each(jnp.where(is_last_BT, values_BT.astype(jnp.float32), 0), segment_ids_BT, most_pairs)


def split_answers(x_BP2: Array) -> tuple[Array, Array]:
    """[B, P, 2] -> the values of the chosen and of the rejected answers, [B, P] each."""
    return x_BP2[..., 0], x_BP2[..., 1]


def has_pair(segment_ids_BT: Array, most_pairs: int) -> Array:
    """bool [B, P]: whether the row has a p-th pair."""
    return jnp.any(_is_in(segment_ids_BT, most_pairs), axis=1).all(-1)


def count_pairs(batch: Batch, most_pairs: int) -> Array:
    """fp32 scalar: pairs of a whole batch [A, B, T]; `Objective.weight` of losses of pairs."""
    count = jax.vmap(lambda segment_ids_BT: jnp.sum(has_pair(segment_ids_BT, most_pairs), dtype=jnp.float32))
    return jnp.sum(count(batch["segment_ids"]))


def sum_over_pairs(values: Mapping[str, Array], is_pair_BP: Array) -> dict[str, Array]:
    """fp32 scalars: sums of `values` [B, P] over the pairs of a micro-batch, and "pairs", their number."""
    values = {**values, "pairs": jnp.ones(is_pair_BP.shape, jnp.float32)}
    return {name: jnp.sum(jnp.where(is_pair_BP, x, 0), dtype=jnp.float32) for name, x in values.items()}


def summarize_pairs(metrics: Mapping[str, float]) -> str:
    """`Objective.summary` of losses of pairs."""
    return (
        f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, reward {metrics['chosen_reward']:.3f} "
        f"chosen, {metrics['rejected_reward']:.3f} rejected"
    )


def _sum_each(values_BT: Array, segment_ids_BT: Array, most_pairs: int) -> Array:
    return jnp.sum(jnp.where(_is_in(segment_ids_BT, most_pairs), values_BT[:, :, None, None], 0), axis=1)


def _is_in(segment_ids_BT: Array, most_pairs: int) -> Array:
    """bool [B, T, P, 2]: whether a token is in this answer."""
    answers = np.arange(1, most_pairs + 1)[:, None] + (np.arange(1, 3) << TRUNK_BITS)
    return segment_ids_BT[:, :, None, None] == jnp.asarray(answers, jnp.int32)


def most_pairs(data: DataConfig) -> int:
    """Largest number of pairs in a row, over all sources.

    Raises FileNotFoundError for a missing source, ValueError for one without rows of pairs.
    """
    found = 0
    for source in data.sources:
        for part in list_parts(source.path):
            manifest = part.manifest
            require(
                manifest.kind == "pairs", "data.sources.path", str(part.path),
                f"it must hold pairs of answers, as `tools/prepare_chat.py --pairs` writes them, not {manifest.kind}",
            )  # fmt: skip
            found = max(found, manifest.most_pairs)
    return found
