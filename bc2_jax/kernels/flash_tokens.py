"""Facts about tokens that the flash attention kernels need, computed in XLA before they start.

A grid step handles one block of queries and one of keys. Everything that depends on whole blocks is decided here and
read as one scalar per step: scalar code in a kernel delays each step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.segments import branch_of, trunk_of

SKIP = 0
"""The step does nothing: no query of the block sees a key of the other."""
_KIND_BITS = 3

_LOWEST, _HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


class Plan(NamedTuple):
    """The grid steps of a kernel."""

    query_blocks: np.ndarray
    """Block of queries of each step, int32 [steps]; the same for all rows."""
    key_blocks: np.ndarray
    steps: Array
    """Each row's steps, int32 [B * steps] (scalar memory pads a second axis): kind and block to fetch."""
    anchors: Array
    """Middle of the ALiBi positions in each block, int32 [B * blocks]: distances from it are small."""


def kind_of(step):
    """The kind in an entry of Plan.steps: SKIP or a value of `kind`."""
    return step & ((1 << _KIND_BITS) - 1)


def kind(diagonal, mixed):
    """What a step must mask. mixed: some query of the block does not see the segment of some key."""
    return 1 + 2 * diagonal + mixed


def fetched(step):
    """The block to fetch in an entry of Plan.steps.

    A skipped step fetches nothing: it names the next needed block (forward) or the last one (backward).
    """
    return step >> _KIND_BITS


def alibi_positions(tokens: Tokens) -> Array:
    """int32 [B, T]: positions shifted by a constant per document, which a softmax ignores.

    A document that is contiguous begins at its index in the row. Two documents in one block then have no jump of
    thousands of positions between them, which would cost fp32 digits of the scores.
    """
    positions, documents = tokens.positions, trunk_of(tokens.segments)
    before, after = documents[:, :-1], documents[:, 1:]
    real = documents != 0
    stretches = jnp.sum(real[:, 1:] & ~real[:, :-1], axis=1) + real[:, 0]
    in_order = jnp.all((before == 0) | (after == 0) | (after >= before), axis=1) & (stretches <= 1)
    moved = jnp.arange(documents.shape[1], dtype=positions.dtype) - positions
    starts = real & jnp.pad(before != after, ((0, 0), (1, 0)), constant_values=True)
    of_document = jax.lax.cummax(jnp.where(starts, moved, _LOWEST), axis=1)
    # The running maximum is the document's own value if no earlier document has a larger one.
    is_largest = jnp.all(~starts | (of_document == moved), axis=1)
    return positions + jnp.where(real & (in_order & is_largest)[:, None], of_document, 0)


def plan_forward(segments_BT: Array, positions_BT: Array, block: int) -> Plan:
    """For each block of queries its blocks of keys, in order. T is a multiple of `block`."""
    query_blocks, key_blocks = np.tril_indices(segments_BT.shape[1] // block)
    blocks = _inspect(segments_BT, positions_BT, block)
    index = np.arange(segments_BT.shape[1] // block)
    first = jnp.where(blocks.shared, index, index[:, None]).min(2)
    return _plan(blocks, query_blocks, key_blocks, jnp.maximum(first[:, query_blocks], key_blocks))


def plan_backward(segments_BT: Array, positions_BT: Array, block: int, start: int, stop: int) -> Plan:
    """For each block of keys its blocks of queries from start to stop - 1."""
    key_blocks, query_blocks = np.triu_indices(stop)
    key_blocks, query_blocks = (x[query_blocks >= start] for x in (key_blocks, query_blocks))
    blocks = _inspect(segments_BT, positions_BT, block)
    index = np.arange(segments_BT.shape[1] // block)
    last = jnp.where(blocks.shared, index[:, None], index).max(1)
    return _plan(blocks, query_blocks, key_blocks, jnp.clip(last[:, key_blocks], start, query_blocks))


class _Blocks(NamedTuple):
    """Facts about pairs of blocks."""

    shared: Array
    """Whether a query of block [B, i] may see a key of block [B, i, j]; True only for j <= i."""
    mixed: Array
    """[B, i, j]: some query does not see the segment of some key."""
    anchors: Array


def _inspect(segments_BT: Array, positions_BT: Array, block: int) -> _Blocks:
    B = segments_BT.shape[0]
    segments, positions = (x.reshape(B, -1, block) for x in (segments_BT, positions_BT))
    documents, branches = trunk_of(segments), branch_of(segments)
    real = segments != 0

    def extent(x: Array) -> tuple[Array, Array]:
        return jnp.where(real, x, _HIGHEST).min(2), jnp.where(real, x, _LOWEST).max(2)

    def overlap(low: Array, high: Array) -> Array:
        return (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])

    # Overlapping ranges may share nothing: then the mask leaves nothing, which is slow but correct.
    branch_low, branch_high = extent(branches)
    shared = overlap(*extent(documents)) & (overlap(branch_low, branch_high) | (branch_low == 0)[:, None])
    shared &= np.tri(shared.shape[1], dtype=bool)
    # All keys must have one segment, that of all queries or of their trunk.
    least, most, document = segments.min(2), segments.max(2), documents.min(2)
    is_one, is_document = least == most, document == documents.max(2)
    is_own = (is_one[:, :, None] & (least[:, :, None] == least[:, None])) | (
        is_document[:, :, None] & (document[:, :, None] == least[:, None])
    )
    mixed = ~(is_one[:, None] & is_own)
    nearest, farthest = extent(positions)
    anchors = jnp.where(nearest <= farthest, nearest + (farthest - nearest) // 2, 0)
    return _Blocks(shared, mixed, anchors)


def _plan(blocks: _Blocks, query_blocks: np.ndarray, key_blocks: np.ndarray, fetch: Array) -> Plan:
    pairs = (slice(None), query_blocks, key_blocks)
    kinds = jnp.where(blocks.shared[pairs], kind(query_blocks == key_blocks, blocks.mixed[pairs]), SKIP)
    steps = (fetch << _KIND_BITS) + kinds
    return Plan(
        query_blocks.astype(np.int32), key_blocks.astype(np.int32), steps.astype(jnp.int32).reshape(-1),
        blocks.anchors.astype(jnp.int32).reshape(-1),
    )  # fmt: skip
