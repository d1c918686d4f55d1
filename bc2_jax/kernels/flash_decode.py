"""Attention of one new token a row to the KV cache, and its own place there, in Pallas for TPU.

The same function as `attention.reference_decode`. Left to itself the compiler multiplies and sums on the vector unit,
for a matmul with one row is none, and reads every slot of the cache. Here the heads of a row are the rows of a matmul,
the slots in use are read once, straight from the cache of all layers, and the rest are not read at all. The new keys
and values are written by the same kernel, for the tile of slots they go to is on the chip then.
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
from bc2_jax.kernels.segments import can_see

BLOCK_BYTES = 2**21
"""Keys that one grid step takes at most: four of these, two of them on their way, fit the VMEM of every chip."""
TILE_BYTES = 32
"""Of one lane in a tile of the chip's memory, the least that can be written: 16 slots in bf16, 8 in fp32."""


def flash_decode(
    q_BNH: Array,
    k_BNH: Array,
    v_BNH: Array,
    k_LBNSH: Array,
    v_LBNSH: Array,
    layer: Array,
    length_B: Array,
    q: Tokens,
    k: Tokens,
    slopes_N: Array | None,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Attention of one new token a row to itself and to slots 0..length_B[b] - 1 of `layer`, and the cache with it.

    Its keys and values go to slot length_B[b], or nowhere where that is behind the last slot. `q` is [B, 1] tokens, `k`
    those of the slots [B, S]. The slot must be in the token's segment or its trunk's; a token of segment 0 gives zeros.
    Scores, ALiBi, softmax and sums are fp32. `layer` is an int32 scalar. Returns [B, N, H] in the dtype of v, and both
    caches, in place where the caller's are donated.
    """
    B, N, H = q_BNH.shape
    S, dtype = k_LBNSH.shape[3], k_LBNSH.dtype
    visible_BS = can_see(q.segments, k.segments) & (jnp.arange(S) < length_B[:, None])
    distance_BS = jnp.where(visible_BS, (k.positions - q.positions).astype(jnp.float32), MASKED)
    slopes = jnp.zeros(N, jnp.float32) if slopes_N is None else slopes_N.astype(jnp.float32) * LOG2_E
    block, tile = block_length(S, N * H * dtype.itemsize), TILE_BYTES // dtype.itemsize

    def last_of(b, length, size):
        """The block of `size` slots that row b's new token goes to."""
        return jax.lax.div(jnp.minimum(length[b], S - 1), size)

    def read(b, j, layer, length, _):
        # Blocks behind a row's last are not fetched: the index does not change.
        return layer[0], b, 0, jnp.minimum(j, last_of(b, length, block)), 0

    heads = pl.BlockSpec((None, N, H), lambda b, j, *_: (b, 0, 0))
    keys = pl.BlockSpec((None, None, N, block, H), read)
    row = pl.BlockSpec(
        (None, 1, block), lambda b, j, layer, length, _: (b, 0, jnp.minimum(j, last_of(b, length, block)))
    )
    written = pl.BlockSpec(
        (None, None, N, tile, H), lambda b, j, layer, length, _: (layer[0], b, 0, last_of(b, length, tile), 0)
    )
    scores = B * N * S
    slots = output(k_LBNSH.shape, dtype, k_LBNSH)
    return pl.pallas_call(
        functools.partial(_kernel, scale=H**-0.5 * LOG2_E, slots=S),
        name="flash_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, S // block),
            in_specs=[heads, heads, heads, keys, keys, row, pl.BlockSpec((N, 1), lambda *_: (0, 0))],
            out_specs=[heads, written, written],
            scratch_shapes=[pltpu.VMEM((N, width), jnp.float32) for width in (H, 1, 1)],
        ),
        out_shape=[output(q_BNH.shape, v_LBNSH.dtype, q_BNH), slots, slots],
        input_output_aliases={6: 1, 7: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # Of a full cache: how much of it is in use is not known here.
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * H,
            transcendentals=scores,
            bytes_accessed=2 * B * N * (S + tile) * H * dtype.itemsize,
        ),
        interpret=interpret,
    )(
        layer[None], length_B, q.segments[:, 0], q_BNH, k_BNH, v_BNH, k_LBNSH, v_LBNSH, distance_BS[:, None],
        slopes[:, None],
    )  # fmt: skip


def block_length(length: int, slot_bytes: int) -> int:
    """Slots of one grid step: the most whole lanes that divide `length` within BLOCK_BYTES, else all or 128."""
    legal = [size for size in range(128, length + 1, 128) if length % size == 0]
    return max((size for size in legal if size * slot_bytes <= BLOCK_BYTES), default=min(legal, default=length))


def _kernel(
    # Scalars: the layer, each row's slots in use and the segment of its token.
    layer, length, segment,
    # The token [N, H] three times, [N, block, H] twice, key position - query position or MASKED [1, block], slopes
    # times log2(e) [N, 1].
    q_ref, new_k_ref, new_v_ref, k_ref, v_ref, distance_ref, slopes_ref,
    # [N, H], and the tiles of the cache that the token goes to [N, tile, H].
    out_ref, k_tile_ref, v_tile_ref,
    # fp32: the result before division [N, H], largest score and total [N, 1].
    out_sum, peak_ref, total_ref,
    *, scale: float, slots: int,
) -> None:  # fmt: skip
    b, j = pl.program_id(0), pl.program_id(1)
    block, tile = k_ref.shape[1], k_tile_ref.shape[1]

    @pl.when(j == 0)
    def _() -> None:
        # The token sees itself, at a distance of 0, unless it is padding.
        own_N1 = (q_ref[...].astype(jnp.float32) * new_k_ref[...].astype(jnp.float32)).sum(1, keepdims=True) * scale
        peak_ref[...] = jnp.where(segment[b] != 0, own_N1, MASKED)
        total_ref[...] = jnp.ones_like(total_ref)
        out_sum[...] = new_v_ref[...].astype(jnp.float32)

    @pl.when(j * block < length[b])
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
        # For padding, which saw nothing but masked scores, 2^0 was summed for each of them.
        seen = peak_ref[...] > MASKED / 2
        out_ref[...] = (out_sum[...] * jnp.where(seen, 1 / total_ref[...], 0.0)).astype(out_ref.dtype)
        # The block on the chip is the one with the token's slot. Behind the last slot, no row of the tile is its own.
        last = jnp.minimum(length[b], slots - 1)
        first = last - jax.lax.rem(last, tile)
        within = pl.ds(pl.multiple_of(jax.lax.rem(first, block), tile), tile)
        for old_ref, new_ref, tile_ref in ((k_ref, new_k_ref, k_tile_ref), (v_ref, new_v_ref, v_tile_ref)):
            for n in range(len(old_ref)):
                old_SH, new_1H = (x.astype(jnp.float32) for x in (old_ref[n, within], new_ref[n : n + 1]))
                is_own = jax.lax.broadcasted_iota(jnp.int32, old_SH.shape, 0) == length[b] - first
                tile_ref[n] = jnp.where(is_own, new_1H, old_SH).astype(tile_ref.dtype)


def own_rows(product, count: int) -> Array:
    """Row n of product(n) for each n: the rows of all heads meet each head's keys, which costs the MXU no more than
    one row, and leaves the heads side by side for the softmax.
    """
    rows = product(0)
    for n in range(1, count):
        rows = jnp.where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == n, product(n), rows)
    return rows
