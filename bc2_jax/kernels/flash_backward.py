"""Backward pass of flash attention as one Pallas kernel: dq, dk and dv from one visit of each pair of blocks.

Separate kernels for dq and for dk and dv (FlashAttention-2, arXiv 2307.08691) compute the scores twice: seven matmuls
per pair instead of five. Here blocks of keys are the outer loop; VMEM holds the fp32 sums of dk and dv of one block and
of dq of all queries of the head. If dq does not fit, queries are processed in spans, one call each.

Scores have keys down and queries across ([S, T]): log-sum-exp and delta are then rows, as stored, and only dq needs a
transposed operand.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bc2_jax.kernels.flash_tiles import LOG2_E, broadcast_columns, keep_causal, keep_visible, matmul, output, rotate
from bc2_jax.kernels.flash_tokens import Plan, fetched, kind, kind_of, plan_backward


def _kernel(
    # Scalars: what to do in each step (flash_tokens.Plan), ALiBi slopes times log2(e).
    query_blocks, key_blocks, steps, anchors, slopes,
    # Blocks [block, H] four times; of the head log-sum-exp and delta, of the row segments and positions, both
    # [blocks, 2, block]; with RoPE cos and signed sin of the row, fp32 [blocks, block, H].
    q_ref, k_ref, v_ref, d_out_ref, stats_ref, rows_ref, rope_refs,
    dq_ref, dk_ref, dv_ref,
    # fp32: dq of the span [span, H], dk and dv of the block of keys, its part of the ALiBi bias down [block, lanes].
    dq_sum, dk_sum, dv_sum, bias_ref,
    # With RoPE: the blocks of queries and of keys, rotated.
    rotated_refs,
    *, start: int, stop: int, chunk: int, diagonal_chunk: int, alibi: bool, scale: float,
) -> None:  # fmt: skip
    b, n, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    i, j = query_blocks[step], key_blocks[step]
    todo = kind_of(steps[b * pl.num_programs(2) + step])
    block = k_ref.shape[0]
    dq_start = pl.multiple_of((i - start) * block, block)

    def bias(of: Array) -> Array:
        """ALiBi of the tokens of a block, [1, block], counted from the middle of the block of keys."""
        return slopes[n] * (rows_ref[of, 1:] - anchors[b * rows_ref.shape[0] + j]).astype(jnp.float32)

    if rope_refs:
        q_used, k_used = rotated_refs
        cos_ref, sin_ref = rope_refs
    else:
        q_used, k_used = q_ref, k_ref

    def unrotated(gradient: Array, of: Array) -> Array:
        return rotate(gradient, cos_ref[of], -sin_ref[of]) if rope_refs else gradient

    @pl.when(i == jnp.maximum(j, start))
    def _() -> None:
        if rope_refs:
            k_used[...] = rotate(k_ref[...], cos_ref[j], sin_ref[j]).astype(k_ref.dtype)
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)
        if alibi:
            bias_ref[...] = broadcast_columns(bias(j), bias_ref.shape[1])

    @pl.when(j == 0)
    def _() -> None:
        dq_sum[pl.ds(dq_start, block), :] = jnp.zeros((block, dq_sum.shape[1]), jnp.float32)

    def visit(*, diagonal: bool, mixed: bool) -> None:
        # The bias in the log-sum-exp is relative to the query's own position, in the scores to the anchor.
        lse_1T = stats_ref[i, :1]
        if alibi:
            lse_1T += bias(i)
        if rope_refs:
            q_used[...] = rotate(q_ref[...], cos_ref[i], sin_ref[i]).astype(q_ref.dtype)
        size = diagonal_chunk if diagonal else chunk
        for first in range(0, block, size):
            queries = slice(first, first + size)
            # Keys right of the diagonal are skipped; only the square on it needs a mask.
            keys = slice(0, first + size if diagonal else block)
            q_TH, d_out_TH, k_SH, v_SH = q_used[queries], d_out_ref[queries], k_used[keys], v_ref[keys]
            s_ST = matmul(k_SH, q_TH, (1, 1)) * (scale * LOG2_E)
            if alibi:
                s_ST += jnp.tile(bias_ref[keys], (1, size // bias_ref.shape[1]))
            if mixed:
                s_ST = keep_visible(s_ST, rows_ref[i, :1, queries], rows_ref[j, :1, keys], key_axis=0)
            if diagonal:
                s_ST = keep_causal(s_ST, first, key_axis=0)
            p_ST = jnp.exp2(s_ST - lse_1T[:, queries])
            dv_sum[keys] += matmul(p_ST.astype(d_out_TH.dtype), d_out_TH, (1, 0))
            dp_ST = matmul(v_SH, d_out_TH, (1, 1))
            ds_ST = (p_ST * (dp_ST - stats_ref[i, 1:, queries])).astype(q_TH.dtype)
            dk_sum[keys] += matmul(ds_ST, q_TH, (1, 0))
            dq_sum[pl.ds(dq_start + first, size), :] += matmul(ds_ST, k_SH, (0, 0))

    for diagonal in (False, True):
        for mixed in (False, True):
            pl.when(todo == kind(diagonal, mixed))(functools.partial(visit, diagonal=diagonal, mixed=mixed))

    @pl.when(i == stop - 1)
    def _() -> None:
        dk_ref[...] = (unrotated(dk_sum[...], j) * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
        # Queries of block j see no later keys. Before j reaches the span, its first block is written but not yet sent.
        done = jnp.maximum(j, start)
        first = pl.multiple_of((done - start) * block, block)
        dq_ref[...] = (unrotated(dq_sum[pl.ds(first, block), :], done) * scale).astype(dq_ref.dtype)


@functools.partial(
    jax.jit, static_argnames=("span", "chunk", "diagonal_chunk", "alibi", "scale", "vmem_bytes", "interpret")
)
def backward(
    q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array, rows: Array, slopes: Array,
    rope: tuple[Array, ...] = (),
    *, span: int, chunk: int, diagonal_chunk: int, alibi: bool, scale: float, vmem_bytes: int, interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """dq, dk and dv, each [B, N, T, H] in its operand's dtype.

    q, k, v, d_out [B, N, T, H]; lse in units of log2 and delta fp32 [B, N, T]; rows int32 [B, blocks, 2, block]
    (segments, ALiBi positions); slopes fp32 [N] times log2(e); rope: as for the forward pass. `span`
    is the number of blocks of queries per call.
    """
    B, N, T, H = q.shape
    blocks, block = rows.shape[1], rows.shape[3]
    stats = jnp.stack([x.reshape(B, N, blocks, block) for x in (lse, delta)], axis=3)
    segments, positions = (rows[:, :, row].reshape(B, T) for row in (0, 1))

    def call(start: int, stop: int, dtype) -> tuple[Array, Array, Array]:
        plan = plan_backward(segments, positions, block, start, stop)
        return backward_span(
            q, k, v, d_out, stats, rows, slopes, plan, rope, start=start, stop=stop, dtype=dtype,
            chunk=chunk, diagonal_chunk=diagonal_chunk, alibi=alibi, scale=scale, vmem_bytes=vmem_bytes,
            interpret=interpret,
        )  # fmt: skip

    if blocks <= span:
        return call(0, blocks, None)
    dq_parts = []
    dk, dv = (jnp.zeros_like(x, jnp.float32) for x in (k, v))
    for start in range(0, blocks, span):
        stop = min(start + span, blocks)
        dq, dk_part, dv_part = call(start, stop, jnp.float32)
        dq_parts.append(dq)
        # Keys after the span get no gradient from it and are not in its result.
        dk, dv = (total.at[:, :, : stop * block].add(part) for total, part in ((dk, dk_part), (dv, dv_part)))
    return jnp.concatenate(dq_parts, axis=2), dk.astype(k.dtype), dv.astype(v.dtype)


def backward_span(
    q: Array, k: Array, v: Array, d_out: Array, stats: Array, rows: Array, slopes: Array, plan: Plan,
    rope: tuple[Array, ...] = (),
    *, start: int, stop: int, dtype, chunk: int, diagonal_chunk: int, alibi: bool, scale: float, vmem_bytes: int,
    interpret: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients from the blocks of queries start..stop-1, in one kernel call.

    stats fp32 [B, N, blocks, 2, block]: log-sum-exp and delta. Returns dq [B, N, (stop - start) * block, H], and dk and
    dv [B, N, stop * block, H] in `dtype` (None: the operand's).
    """
    B, N, T, H = q.shape
    blocks, block = rows.shape[1], rows.shape[3]
    num_steps = len(plan.query_blocks)

    def query(b, n, step, query_blocks, key_blocks, steps, *_):
        return b, n, fetched(steps[b * num_steps + step]), 0

    def key(b, n, step, query_blocks, key_blocks, *_):
        return b, n, key_blocks[step], 0

    def dq_index(b, n, step, query_blocks, key_blocks, *_):
        return b, n, jnp.maximum(key_blocks[step] - start, 0), 0

    q_spec, k_spec, dq_spec = (pl.BlockSpec((None, None, block, H), index) for index in (query, key, dq_index))
    stats_spec = pl.BlockSpec((None, None, blocks, 2, block), lambda b, n, *_: (b, n, 0, 0, 0))
    row_spec = pl.BlockSpec((None, blocks, 2, block), lambda b, *_: (b, 0, 0, 0))
    rope_spec = pl.BlockSpec((None, blocks, block, H), lambda b, *_: (b, 0, 0, 0))
    scores = B * N * num_steps * block * block
    dtypes = q.dtype, dtype or k.dtype, dtype or v.dtype
    lengths = (stop - start) * block, stop * block, stop * block
    moved = sum(length * H * jnp.dtype(kind).itemsize for length, kind in zip(lengths, dtypes, strict=True))
    moved += 2 * (num_steps + stop) * block * H * q.dtype.itemsize + 8 * T
    return pl.pallas_call(
        functools.partial(
            _kernel, start=start, stop=stop, chunk=chunk, diagonal_chunk=diagonal_chunk, alibi=alibi, scale=scale
        ),
        name="flash_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, N, num_steps),
            in_specs=[q_spec, k_spec, k_spec, q_spec, stats_spec, row_spec, tuple(rope_spec for _ in rope)],
            out_specs=[dq_spec, k_spec, k_spec],
            scratch_shapes=[
                pltpu.VMEM((lengths[0], H), jnp.float32),
                pltpu.VMEM((block, H), jnp.float32),
                pltpu.VMEM((block, H), jnp.float32),
                pltpu.VMEM((block, math.gcd(chunk, diagonal_chunk, 128)), jnp.float32),
                tuple(pltpu.VMEM((block, H), q.dtype) for _ in rope),
            ],
        ),
        out_shape=[output((B, N, length, H), kind, q) for length, kind in zip(lengths, dtypes, strict=True)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(flops=10 * scores * H, transcendentals=scores, bytes_accessed=B * N * moved),
        interpret=interpret,
    )(*plan, slopes, q, k, v, d_out, stats, rows, rope)
