"""Attention of one new token a sequence to the KV cache, in Pallas for TPU.

The same function as `attention.reference_attention` with one query. Left to itself the compiler multiplies and sums on
the vector unit, for a matmul with one row is none, and reads every slot of the cache. Here the heads of a sequence are
the rows, the slots in use are read once, straight from the cache of all layers, and the rest are not read at all.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bc2_jax.kernels.attention import MASKED, Tokens
from bc2_jax.kernels.flash_tiles import LOG2_E, matmul, output

BLOCK_BYTES = 2**21
"""Keys that one grid step takes at most: four of these, two of them on their way, fit the VMEM of every chip."""


def flash_decode(
    q_BNH: Array,
    k_LBNSH: Array,
    v_LBNSH: Array,
    layer: Array,
    length: Array,
    q: Tokens,
    k: Tokens,
    slopes_N: Array | None,
    *,
    interpret: bool = False,
) -> Array:
    """The attention of the query in slot `length` to slots 0..length of `layer`; q is [B, 1] tokens, k [B, S].

    Token and slot must have the same non-zero segment; a query that sees nothing gives zeros. Scores, ALiBi, softmax
    and sums are fp32. `layer` and `length` are int32 scalars. Returns [B, N, H] in the dtype of v.
    """
    B, N, H = q_BNH.shape
    S = k_LBNSH.shape[3]
    visible_BS = (q.segments == k.segments) & (k.segments != 0) & (jnp.arange(S) <= length)
    distance_BS = jnp.where(visible_BS, (k.positions - q.positions).astype(jnp.float32), MASKED)
    slopes = jnp.zeros(N, jnp.float32) if slopes_N is None else slopes_N.astype(jnp.float32) * LOG2_E
    block = block_length(S, N * H * k_LBNSH.dtype.itemsize)

    def slots(b, j, layer, last):
        # Blocks behind the last are not fetched: the index does not change.
        return layer[0], b, 0, jnp.minimum(j, last[0]), 0

    heads = pl.BlockSpec((None, N, H), lambda b, j, *_: (b, 0, 0))
    keys = pl.BlockSpec((None, None, N, block, H), slots)
    row = pl.BlockSpec((None, 1, block), lambda b, j, layer, last: (b, 0, jnp.minimum(j, last[0])))
    scores = B * N * S
    return pl.pallas_call(
        functools.partial(_kernel, scale=H**-0.5 * LOG2_E),
        name="flash_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, S // block),
            in_specs=[heads, keys, keys, row, pl.BlockSpec((N, 1), lambda *_: (0, 0))],
            out_specs=heads,
            scratch_shapes=[pltpu.VMEM((N, width), jnp.float32) for width in (H, 1, 1)],
        ),
        out_shape=output(q_BNH.shape, v_LBNSH.dtype, q_BNH),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # Of a full cache: how much of it is in use is not known here.
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * H, transcendentals=scores, bytes_accessed=2 * scores * H * k_LBNSH.dtype.itemsize
        ),
        interpret=interpret,
    )(layer[None], length[None] // block, q_BNH, k_LBNSH, v_LBNSH, distance_BS[:, None], slopes[:, None])


def block_length(length: int, slot_bytes: int) -> int:
    """Slots of one grid step: the most whole lanes that divide `length` within BLOCK_BYTES, else all or 128."""
    legal = [size for size in range(128, length + 1, 128) if length % size == 0]
    return max((size for size in legal if size * slot_bytes <= BLOCK_BYTES), default=min(legal, default=length))


def _kernel(
    # Scalars: the layer, the last block with slots in use.
    layer, last,
    # [N, H], [N, block, H] twice, key position - query position or MASKED [1, block], slopes times log2(e) [N, 1].
    q_ref, k_ref, v_ref, distance_ref, slopes_ref,
    out_ref,
    # fp32: the result before division [N, H], largest score and total [N, 1].
    out_sum, peak_ref, total_ref,
    *, scale: float,
) -> None:  # fmt: skip
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _() -> None:
        out_sum[...] = jnp.zeros_like(out_sum)
        peak_ref[...] = jnp.full_like(peak_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(j <= last[0])
    def _() -> None:
        distance_1S = distance_ref[...]
        s_NS = own_rows(lambda n: matmul(q_ref[...], k_ref[n], (1, 1)), len(k_ref)) * scale
        s_NS = jnp.where(distance_1S > MASKED / 2, s_NS + slopes_ref[...] * distance_1S, MASKED)
        old_peak = peak_ref[...]
        peak = jnp.maximum(old_peak, s_NS.max(1, keepdims=True))
        shrink = jnp.exp2(old_peak - peak)
        p_NS = jnp.exp2(s_NS - peak)
        peak_ref[...] = peak
        total_ref[...] = total_ref[...] * shrink + p_NS.sum(1, keepdims=True)
        p_NS = p_NS.astype(v_ref.dtype)
        pv_NH = own_rows(lambda n: matmul(p_NS, v_ref[n], (1, 0)), len(v_ref))
        out_sum[...] = out_sum[...] * shrink + pv_NH

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        # A query that saw nothing but masked scores has summed 2^0 for each of them.
        seen = peak_ref[...] > MASKED / 2
        out_ref[...] = (out_sum[...] * jnp.where(seen, 1 / total_ref[...], 0.0)).astype(out_ref.dtype)


def own_rows(product, count: int) -> Array:
    """Row n of product(n) for each n: the rows of all heads meet each head's keys, which costs the MXU no more than
    one row, and leaves the heads side by side for the softmax.
    """
    rows = product(0)
    for n in range(1, count):
        rows = jnp.where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == n, product(n), rows)
    return rows
