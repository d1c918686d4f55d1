"""Attention of one new token per row to the KV cache, and writing it there, in Pallas for TPU.

Same function as `cached.cached_attention` with one token per row. The compiler alone would multiply on the vector unit,
since the matmul has a single row, and read every slot. Here the heads of a row are the rows of a matmul, only used
slots are read, once, straight from the cache of all layers, and the same kernel writes the new keys and values, whose
tile of slots is on the chip anyway.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bc2_jax.kernels.attention import MASKED
from bc2_jax.kernels.cached import LANES, KVCache, quantize_tokens, row_major
from bc2_jax.kernels.flash_tiles import LOG2_E, matmul, output
from bc2_jax.sharding import current_chip
from bc2_jax.tpu.chips import CHIPS

BLOCK_BYTES = 2**21
"""Maximum size of the keys of a grid step: four such blocks, two of them in transfer, fit the VMEM of every chip."""
TILE_BYTES = 32
"""Bytes per lane of a memory tile, the smallest unit of a write: 32 slots of int8, 16 of bf16, 8 of fp32."""


def flash_decode(
    q_BNH: Array, k_BNH: Array, v_BNH: Array, cache: KVCache, layer: Array, start_B: Array, slopes_BN: Array | None, *,
    cores: int | None = None, interpret: bool = False,
) -> tuple[Array, KVCache]:  # fmt: skip
    """Attention of one new token per row to itself and to slots 0..start_B[b] - 1 of `layer`; also writes the cache.

    Its key and value go to slot start_B[b], or nowhere beyond the last slot. A row with a negative start is neither
    read nor written, and its result is meaningless. Scores, ALiBi, softmax and sums are fp32; int8 keys and values are
    multiplied as they are, scores and weights with their scales. `layer` is an int32 scalar. Returns [B, N, H] in the
    dtype of q, and the cache, in place if the caller donates it.

    `cores` TensorCores share the rows, by default those of the chip in use. With one, rows with a negative start take
    almost no time; with two they cost a block of slots each.
    """
    B, N, H = q_BNH.shape
    S, dtype = cache.k.shape[3], cache.k.dtype
    quantized = cache.k_scale is not None
    slopes_BN = jnp.zeros((B, N), jnp.float32) if slopes_BN is None else slopes_BN.astype(jnp.float32) * LOG2_E
    block, tile = block_length(S, N * H * dtype.itemsize), TILE_BYTES // dtype.itemsize
    news, scales = [k_BNH, v_BNH], []
    if quantized:
        (k_q, k_scale), (v_q, v_scale) = (quantize_tokens(row_major(x)) for x in (k_BNH, v_BNH))
        # int8 has other tiles than q; small integers are exact in any dtype.
        news, scales = [k_q.astype(q_BNH.dtype), v_q.astype(q_BNH.dtype)], [k_scale[..., None], v_scale[..., None]]

    cores = _cores_in_use() if cores is None else cores
    source_B = _sources(start_B) if cores == 1 else jnp.arange(B)

    def last_of(b, start, size):
        """The block of `size` slots that contains the slot of row b's new token."""
        return jax.lax.div(jnp.clip(start[b], 0, S - 1), size)

    def slots(size: int, index) -> pl.BlockSpec:
        """A block of a cache, [N, size, H]."""
        return pl.BlockSpec(
            (None, None, N, size, H), lambda b, j, *s: (s[0][0], s[2][b], 0, index(b, j, *s[1:], size), 0)
        )

    def lanes(rows: int, index) -> pl.BlockSpec:
        """The scales of a block of slots, [N, rows, LANES]."""
        return pl.BlockSpec(
            (None, None, N, rows, LANES), lambda b, j, *s: (s[0][0], s[2][b], 0, index(b, j, *s[1:], rows * LANES), 0)
        )

    # A block stays on the chip while its index does not change.
    def read(b, j, start, source, size):
        last = last_of(source[b], start, size)
        # Before the first row with a token: its first block. After a row with one: its last.
        return jnp.where(
            b < source[b], 0, jnp.where(b > source[b], last, jnp.minimum(jax.lax.div(j * block, size), last))
        )

    def written(b, j, start, source, size):
        return last_of(source[b], start, size)

    heads = pl.BlockSpec((None, N, H), lambda b, j, *_: (b, 0, 0))
    column = pl.BlockSpec((None, N, 1), lambda b, j, *_: (b, 0, 0))
    held = [x for x in cache if x is not None]
    read_rows, tile_rows = scale_rows(block // LANES, S // LANES)
    in_specs = [heads] * 3 + [column] * (len(scales) + 1)
    in_specs += [slots(block, read)] * 2 + [lanes(read_rows, read)] * len(scales)
    first = 3 + 1 + len(news) + len(scales) + 1  # of the arrays of the cache among all operands
    out, *changed = pl.pallas_call(
        functools.partial(_kernel, scale=H**-0.5 * LOG2_E, slots=S, quantized=quantized),
        name="flash_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, S // block),
            in_specs=in_specs,
            out_specs=[heads] + [slots(tile, written)] * 2 + [lanes(tile_rows, written)] * len(scales),
            scratch_shapes=[pltpu.VMEM((N, width), jnp.float32) for width in (H, 1, 1)],
        ),
        out_shape=[output(q_BNH.shape, q_BNH.dtype, q_BNH), *(output(x.shape, x.dtype, x) for x in held)],
        input_output_aliases={first + i: 1 + i for i in range(len(held))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if cores == 1 else "parallel", "arbitrary")
        ),
        # Of a full cache: how much of it is in use is not known here.
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * S * H,
            transcendentals=B * N * S,
            bytes_accessed=2 * B * N * ((S + tile) * H * dtype.itemsize + 4 * quantized * (S + tile_rows * LANES)),
        ),
        interpret=interpret,
    )(layer[None], start_B, source_B, q_BNH, *news, *scales, slopes_BN[..., None], *held)
    return out, KVCache(*changed, *[None] * (4 - len(held)))


def block_length(length: int, slot_bytes: int) -> int:
    """Slots per grid step: the largest multiple of 128 that divides `length` within BLOCK_BYTES, else the smallest,
    else all."""
    legal = [size for size in range(128, length + 1, 128) if length % size == 0]
    return max((size for size in legal if size * slot_bytes <= BLOCK_BYTES), default=min(legal, default=length))


def scale_rows(block: int, length: int) -> tuple[int, int]:
    """Rows of LANES scales that are read and written at a time, for blocks and a cache row of that many.

    The hardware transfers multiples of 8 rows, or all; what is written must be within what was read.
    """
    fitting = (size for size in range(block, length, block) if size % 8 == 0 and length % size == 0)
    return next(fitting, length), 8 if length % 8 == 0 else length


def _kernel(layer, start, source, *refs, scale: float, slots: int, quantized: bool) -> None:
    """`refs`: q, k, v of the token [N, H]; scales of its int8 key and value, and slopes times log2(e) [N, 1] each; the
    cache [N, block, H] twice and its scales [N, rows, LANES] twice; results: [N, H] and the tiles of the cache that the
    token goes to; fp32 scratch: result before division [N, H], largest score and total [N, 1]."""
    count = 2 * (1 + quantized)
    q_ref, new_k_ref, new_v_ref, *refs = refs  # type: ignore[assignment]  # a tuple, then a list
    new_scales, slopes_ref, refs = refs[: count - 2], refs[count - 2], refs[count - 1 :]
    held, out_ref, tiles = refs[:count], refs[count], refs[count + 1 : 2 * count + 1]
    out_sum, peak_ref, total_ref = refs[2 * count + 1 :]
    k_ref, v_ref, *scales = held
    b, j = pl.program_id(0), pl.program_id(1)
    block = k_ref.shape[1]

    def scales_NS(ref) -> Array:
        """Of the slots of this block."""
        count = block // LANES
        first = 0 if ref.shape[1] == count else jax.lax.rem(j * count, ref.shape[1])
        return jnp.concatenate([ref[:, first + i] for i in range(count)], axis=1)

    @pl.when(j == 0)
    def _() -> None:
        # The token sees itself, at distance 0.
        k_NH, v_NH = (ref[...].astype(jnp.float32) for ref in (new_k_ref, new_v_ref))
        if quantized:
            k_NH, v_NH = k_NH * new_scales[0][...], v_NH * new_scales[1][...]
        peak_ref[...] = (q_ref[...].astype(jnp.float32) * k_NH).sum(1, keepdims=True) * scale
        total_ref[...] = jnp.ones_like(total_ref)
        out_sum[...] = v_NH

    @pl.when(j * block < start[b])
    def _() -> None:
        q_NH = q_ref[...]
        distance_1S = jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) + (j * block - start[b])
        s_NS = own_rows(lambda n: matmul(q_NH, k_ref[n].astype(q_NH.dtype), (1, 1)), len(k_ref)) * scale
        if quantized:
            s_NS *= scales_NS(scales[0])
        s_NS = jnp.where(distance_1S < 0, s_NS + slopes_ref[...] * distance_1S.astype(jnp.float32), MASKED)
        old_peak = peak_ref[...]
        peak = jnp.maximum(old_peak, s_NS.max(1, keepdims=True))
        shrink = jnp.exp2(old_peak - peak)
        p_NS = jnp.exp2(s_NS - peak)
        peak_ref[...] = peak
        total_ref[...] = total_ref[...] * shrink + p_NS.sum(1, keepdims=True)
        if quantized:
            # Unused slots have arbitrary scales, even NaN.
            p_NS = jnp.where(distance_1S < 0, p_NS * scales_NS(scales[1]), 0.0)
        p_NS = p_NS.astype(q_NH.dtype)
        pv_NH = own_rows(lambda n: matmul(p_NS, v_ref[n].astype(q_NH.dtype), (1, 0)), len(v_ref))
        out_sum[...] = out_sum[...] * shrink + pv_NH

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[...] = (out_sum[...] / total_ref[...]).astype(out_ref.dtype)

    @pl.when((j == pl.num_programs(1) - 1) & (source[b] == b))
    def _() -> None:
        # The loaded block contains the token's slot. Beyond the last slot, or without a token, no column of the tile
        # matches.
        last = jnp.clip(start[b], 0, slots - 1)
        for old_ref, new_ref, tile_ref in zip(held[:2], (new_k_ref, new_v_ref), tiles, strict=False):
            tile = tile_ref.shape[1]
            first = last - jax.lax.rem(last, tile)
            within = pl.ds(pl.multiple_of(jax.lax.rem(first, block), tile), tile)
            for n in range(len(old_ref)):
                old_SH, new_1H = (x.astype(jnp.float32) for x in (old_ref[n, within], new_ref[n : n + 1]))
                is_own = jax.lax.broadcasted_iota(jnp.int32, old_SH.shape, 0) == start[b] - first
                tile_ref[n] = jnp.where(is_own, new_1H, old_SH).astype(tile_ref.dtype)
        for old_ref, new_ref, tile_ref in zip(scales, new_scales, tiles[2:], strict=True):
            tile = tile_ref.shape[1]
            first = jax.lax.div(last, tile * LANES) * tile
            within = pl.ds(pl.multiple_of(jax.lax.rem(first, old_ref.shape[1]), tile), tile)
            row, lane = (jax.lax.broadcasted_iota(jnp.int32, tile_ref.shape[1:], axis) for axis in (0, 1))
            is_own = (first + row) * LANES + lane == start[b]
            for n in range(len(old_ref)):
                tile_ref[n] = jnp.where(is_own, new_ref[n : n + 1], old_ref[n, within])


def _sources(start_B: Array) -> Array:
    """int32 [B]: the row whose blocks each row loads.

    A row with a token loads its own; others keep those of the last such row before it, else of the first, else of row
    0.
    """
    rows_B, has_B = jnp.arange(len(start_B)), start_B >= 0
    before_BC = has_B & (rows_B <= rows_B[:, None])
    last_B = jnp.where(before_BC, rows_B, -1).max(axis=1)
    return jnp.where(last_B < 0, jnp.argmax(has_B).astype(jnp.int32), last_B)


def _cores_in_use() -> int:
    """TensorCores of a device; 2 for an unknown chip, which is always correct."""
    chip = current_chip()
    return 2 if chip is None else CHIPS[chip].tensor_cores // CHIPS[chip].devices


def own_rows(product, count: int) -> Array:
    """Row n of product(n), for each n.

    Multiplying the rows of all heads with each head's keys costs the MXU no more than one row and leaves the heads
    adjacent for the softmax.
    """
    rows = product(0)
    for n in range(1, count):
        rows = jnp.where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == n, product(n), rows)
    return rows
