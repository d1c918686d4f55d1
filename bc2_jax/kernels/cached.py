"""Attention of new tokens to a KV cache, and writing them to it, in plain JAX.

Each row of the cache holds one sequence: the token at position p is in slot p. New tokens are written first and then
attend to their row up to themselves. Keys are visited in blocks of slots with an online softmax (Rabe & Staats, arXiv
2112.05682), up to the last used slot: the result for a row depends, to the last bit, neither on the number of slots nor
on other rows.

Shapes: R rows of new tokens, T tokens each, B rows of the cache, S slots, N heads, H head size, L layers. Functions
work on one device's rows and heads; `model/attention.py` places them on the mesh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from bc2_jax.kernels.attention import MASKED
from bc2_jax.sharding import platform

BLOCK = 128
"""The slots of a cache are a multiple of this; a CPU visits this many at a time (`key_block`)."""
LANES = 128
"""Adjacent scales of a cache: the lanes of a TPU's tile. Divides BLOCK."""


class KVCache(NamedTuple):
    """Keys and values of the tokens of B rows; unused slots hold any finite values."""

    k: Array
    """[L, B, N, S, H], floating or int8: slots and head size last, so that a TPU's tiles have no padding."""
    v: Array
    k_scale: Array | None
    """fp32 [L, B, N, S / LANES, LANES]: factors of the int8 keys by token and head; None for a floating dtype. With S
    last after the few heads of a chip, tiles would have padding and the cache would be copied."""
    v_scale: Array | None


class Place(NamedTuple):
    """Where new tokens are written, int32 [R] each."""

    rows: Array
    """Rows of the cache; if R = B, all rows in order."""
    start: Array
    """Slot, and position, of the first of the T new tokens; negative: nothing is read or written, and the result is
    meaningless."""


def quantize_tokens(x: Array) -> tuple[Array, Array]:
    """[..., H] -> int8 [..., H] and fp32 scales [...]; x is about q * scale, and the largest |x| is 127 steps."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    q = jnp.round(x / jnp.where(scale == 0, 1.0, scale)[..., None])
    return q.astype(jnp.int8), scale


def write_slots(cache: KVCache, layer: Array, place: Place, k_RTNH: Array, v_RTNH: Array) -> KVCache:
    """The cache with new keys and values in slots start..start + T - 1 of one layer; slots beyond the last are dropped.

    With T > 1 all T slots must exist, and if T is a multiple of LANES so must be start. In place if the caller donates
    the cache.
    """
    R, T = k_RTNH.shape[:2]
    scales: tuple[Array | None, Array | None] = (None, None)
    if cache.k_scale is not None:
        (k_RTNH, k_scale), (v_RTNH, v_scale) = quantize_tokens(k_RTNH), quantize_tokens(v_RTNH)
        scales = (k_scale, v_scale)
    news = (k_RTNH.astype(cache.k.dtype), v_RTNH.astype(cache.v.dtype), *scales)
    if T == 1:
        S = cache.k.shape[3]
        slot_R = jnp.where(place.start < 0, S, place.start)

        def put_token(x: Array, new: Array) -> Array:
            at: tuple[Any, ...] = (layer, place.rows, slice(None))
            at += (slot_R,) if x.shape[3] == S else (slot_R // LANES, slot_R % LANES)
            return x.at[at].set(new[:, 0], mode="drop")

        return jax.tree.map(put_token, cache, KVCache(*news))

    def put(r: Array | int, cache: KVCache) -> KVCache:
        row, start = place.rows[r], place.start[r]

        def put_tokens(x: Array, new: Array) -> Array:
            at: list[Any] = [layer, row, 0, jnp.maximum(start, 0), 0]
            new = jnp.swapaxes(new[r], 0, 1)
            if new.ndim == 2:
                if T % LANES:  # any part of a row of lanes, and of the next
                    slot_T = jnp.where(start < 0, cache.k.shape[3], start + jnp.arange(T))
                    return x.at[layer, row, :, slot_T // LANES, slot_T % LANES].set(new.T, mode="drop")
                at[3] //= LANES
                new = new.reshape(len(new), -1, LANES)
            old = jax.lax.dynamic_slice(x, at, (1, 1, *new.shape))
            return jax.lax.dynamic_update_slice(x, row_major(jnp.where(start < 0, old, new[None, None])), at)

        return jax.tree.map(put_tokens, cache, KVCache(*news))

    return put(0, cache) if R == 1 else jax.lax.fori_loop(0, R, put, cache)


def copy_chunks(cache: KVCache, row_from: Array, row_to: Array, chunks: Array, size: int, is_wanted: Array) -> KVCache:
    """The cache with the first `chunks` * `size` slots of a row copied to another, if bool `is_wanted`.

    `size` is a multiple of LANES or divides it.
    """

    def copy_chunk(i: Array, x: Array) -> Array:
        slot, count, width = i * size, size, x.shape[4]
        lane: Any = 0
        if x.shape[3] < cache.k.shape[3]:
            # Scales stand in rows of LANES, of which a chunk has several or a part of one.
            slot, count, lane, width = slot // LANES, max(size // LANES, 1), slot % LANES, min(size, LANES)
        shape = (x.shape[0], 1, x.shape[2], count, width)
        new, old = (jax.lax.dynamic_slice(x, (0, row, 0, slot, lane), shape) for row in (row_from, row_to))
        return jax.lax.dynamic_update_slice(x, jnp.where(is_wanted, new, old), (0, row_to, 0, slot, lane))

    return jax.tree.map(lambda x: jax.lax.fori_loop(0, chunks, copy_chunk, x), cache)


def key_block(slots: int) -> int:
    """Slots that plain JAX attention visits at a time on the devices in use.

    Twice as many take a TPU only 1.2 times as long (compiled for v5e, 5 heads, 256 queries). With prompt chunks of that
    length the slots are always a multiple of it, so results do not depend on their number.
    """
    return BLOCK if platform() == "cpu" or slots % (2 * BLOCK) else 2 * BLOCK


def cached_attention(
    q_RTNH: Array, k_RTNH: Array, v_RTNH: Array, cache: KVCache, layer: Array, place: Place, slopes_RN: Array | None
) -> tuple[Array, KVCache]:
    """Writes T new tokens per row to one layer of the cache; each attends to its row up to itself.

    `slopes_RN` are ALiBi's, fp32. Scores, bias, softmax and sums are fp32. Returns [R, T, N, H] in the dtype of q, and
    the cache.
    """
    cache = write_slots(cache, layer, place, k_RTNH, v_RTNH)
    R, T, N, H = q_RTNH.shape
    q_RNTH = jnp.swapaxes(q_RTNH, 1, 2)
    if platform() == "cpu":  # where bf16 matmuls are slow
        q_RNTH = q_RNTH.astype(jnp.float32)
    positions_RT = place.start[:, None] + jnp.arange(T)
    S, is_whole = cache.k.shape[3], cache.k.shape[1] == R
    block = key_block(S)

    def read(x: Array, j: Array) -> Array:
        """Block j of each of the R rows: [R, N, block, H] or, of scales, [R, N, block]."""
        rows_of_block = block * x.shape[3] // S
        size = (1, x.shape[1] if is_whole else 1, N, rows_of_block, x.shape[4])
        rows = [0] if is_whole else [place.rows[r] for r in range(R)]
        found = [row_major(jax.lax.dynamic_slice(x, (layer, row, 0, j * rows_of_block, 0), size))[0] for row in rows]
        blocks = jnp.concatenate(found) if len(found) > 1 else found[0]
        return blocks if rows_of_block == block else blocks.reshape(R, N, block)

    def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        k_RNSH, v_RNSH = read(cache.k, j), read(cache.v, j)
        if cache.k.shape[3] == BLOCK:
            # A single block would be the same in every iteration: the compiler would hoist the scores out of the loop,
            # away from what they are fused with in other caches, and round them differently.
            k_RNSH, j = jax.lax.optimization_barrier((k_RNSH, j))
        s_RNTS = _matmul("RNTH,RNSH->RNTS", q_RNTH, k_RNSH.astype(q_RNTH.dtype)) * H**-0.5
        if cache.k_scale is not None:
            s_RNTS *= read(cache.k_scale, j)[:, :, None]
        distance_RTS = j * block + jnp.arange(block) - positions_RT[..., None]
        if slopes_RN is not None:
            s_RNTS += slopes_RN[..., None, None] * distance_RTS[:, None].astype(jnp.float32)
        mask = (distance_RTS <= 0)[:, None]
        new_peak = jnp.maximum(peak, jnp.where(mask, s_RNTS, MASKED).max(-1))
        p_RNTS = jnp.where(mask, jnp.exp(s_RNTS - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + p_RNTS.sum(-1)
        if cache.v_scale is not None:
            p_RNTS *= read(cache.v_scale, j)[:, :, None]
        pv_RNTH = _matmul("RNTS,RNSH->RNTH", p_RNTS.astype(q_RNTH.dtype), v_RNSH.astype(q_RNTH.dtype))
        return out * shrink[..., None] + pv_RNTH, new_peak, total

    # Made from q, so that under shard_map they vary over the same mesh axes as what is added to them.
    zeros = jnp.zeros_like(q_RNTH, jnp.float32)
    count = jnp.max(place.start + T - 1) // block + 1
    count = jnp.minimum(count, S // block)
    out, _, total = jax.lax.fori_loop(0, count, visit, (zeros, zeros[..., 0] + MASKED, zeros[..., 0]))
    out_RNTH = out / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.swapaxes(out_RNTH, 1, 2).astype(q_RTNH.dtype), cache


def row_major(x: Array) -> Array:
    """`x` in row-major layout on a TPU.

    Keeps consumers of a slice or product from choosing another layout for all of the cache or weights, which would copy
    them.
    """
    if platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _matmul(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
