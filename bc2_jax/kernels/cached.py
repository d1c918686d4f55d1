"""Attention of new tokens to a KV cache, and their own place in it, in plain JAX.

Each row of the cache holds one sequence: its token at position p in slot p. New tokens are written first and then
attend to their row from its first slot to themselves. Keys are visited in blocks of BLOCK slots with an online softmax
(Rabe & Staats, arXiv 2112.05682), up to the last slot in use: what is computed for a row, to the last bit, depends
neither on the slots that the cache has nor on its other rows.

Shapes: R rows of new tokens, T tokens of each, B rows of the cache, S slots, N heads, H head size, L layers. All
functions work on one device's rows and heads; `model/attention.py` places them on the mesh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bc2_jax.kernels.attention import MASKED
from bc2_jax.sharding import platform

BLOCK = 128
"""Slots that are visited at once; the slots of a cache must be a multiple of it."""


class KVCache(NamedTuple):
    """Keys and values of the tokens of B rows; slots that are not in use hold anything finite."""

    k: Array
    """[L, B, N, S, H], a floating dtype or int8: slots and head size last, so that a TPU's tiles hold no padding."""
    v: Array
    k_scale: Array | None
    """fp32 [L, B, N, S]: what the int8 keys of a token and head are multiplied with; None for a floating dtype."""
    v_scale: Array | None


class Place(NamedTuple):
    """Where new tokens go, int32 [R] each."""

    rows: Array
    """Rows of the cache; all rows in their order where there are as many."""
    start: Array
    """Slot, and position, of the first of the T new tokens; negative where a row has none: it is neither read nor
    written, and what attention gives is of no use."""


def quantize_tokens(x: Array) -> tuple[Array, Array]:
    """[..., H] -> int8 [..., H] and fp32 scales [...]: x is q * scale to half a step; the largest |x| is 127 steps."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    q = jnp.round(x / jnp.where(scale == 0, 1.0, scale)[..., None])
    return q.astype(jnp.int8), scale


def write_slots(cache: KVCache, layer: Array, place: Place, k_RTNH: Array, v_RTNH: Array) -> KVCache:
    """The cache with new keys and values in slots start..start + T - 1 of one layer; those behind the last are dropped.

    With T > 1 all T slots must exist. In place where the caller's cache is donated.
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
        at = (layer, place.rows, slice(None), slot_R)
        return jax.tree.map(lambda x, new: x.at[at].set(new[:, 0], mode="drop"), cache, KVCache(*news))

    def put(r: Array | int, cache: KVCache) -> KVCache:
        def put_one(x: Array, new: Array) -> Array:
            start: list[Any] = [layer, place.rows[r], 0, jnp.maximum(place.start[r], 0), *[0] * (x.ndim - 4)]
            block = jnp.swapaxes(new[r], 0, 1)[None, None]
            old = jax.lax.dynamic_slice(x, start, block.shape)
            return jax.lax.dynamic_update_slice(x, jnp.where(place.start[r] < 0, old, block), start)

        return jax.tree.map(put_one, cache, KVCache(*news))

    return put(0, cache) if R == 1 else jax.lax.fori_loop(0, R, put, cache)


def cached_attention(
    q_RTNH: Array, k_RTNH: Array, v_RTNH: Array, cache: KVCache, layer: Array, place: Place, slopes_RN: Array | None
) -> tuple[Array, KVCache]:
    """Writes T new tokens a row to one layer of the cache; each attends to its row up to itself.

    `slopes_RN` are ALiBi's, fp32, of each row. Scores, bias, softmax and sums are fp32. Returns [R, T, N, H] in the
    dtype of q, and the cache.
    """
    cache = write_slots(cache, layer, place, k_RTNH, v_RTNH)
    R, T, N, H = q_RTNH.shape
    q_RNTH = jnp.swapaxes(q_RTNH, 1, 2)
    if platform() == "cpu":  # where bf16 matmuls are slow
        q_RNTH = q_RNTH.astype(jnp.float32)
    positions_RT = place.start[:, None] + jnp.arange(T)
    is_whole = cache.k.shape[1] == R

    def read(x: Array, j: Array) -> Array:
        """Block j of each of the R rows: [R, N, BLOCK, ...]."""
        tail = [0] * (x.ndim - 4)
        size = (1, x.shape[1] if is_whole else 1, N, BLOCK, *x.shape[4:])
        if is_whole:
            return jax.lax.dynamic_slice(x, (layer, 0, 0, j * BLOCK, *tail), size)[0]
        blocks = [jax.lax.dynamic_slice(x, (layer, place.rows[r], 0, j * BLOCK, *tail), size)[0] for r in range(R)]
        return jnp.concatenate(blocks)

    def visit(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        k_RNSH, v_RNSH = read(cache.k, j), read(cache.v, j)
        if cache.k.shape[3] == BLOCK:
            # The only block would be the same in every turn: the compiler would move the scores out of the loop, away
            # from what they are fused with in other caches, and they would be rounded otherwise.
            k_RNSH, j = jax.lax.optimization_barrier((k_RNSH, j))
        s_RNTS = _matmul("RNTH,RNSH->RNTS", q_RNTH, k_RNSH.astype(q_RNTH.dtype)) * H**-0.5
        if cache.k_scale is not None:
            s_RNTS *= read(cache.k_scale, j)[:, :, None]
        distance_RTS = j * BLOCK + jnp.arange(BLOCK) - positions_RT[..., None]
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
    count = jnp.max(place.start + T - 1) // BLOCK + 1
    count = jnp.minimum(count, cache.k.shape[3] // BLOCK)
    out, _, total = jax.lax.fori_loop(0, count, visit, (zeros, zeros[..., 0] + MASKED, zeros[..., 0]))
    out_RNTH = out / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.swapaxes(out_RNTH, 1, 2).astype(q_RTNH.dtype), cache


def _matmul(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
