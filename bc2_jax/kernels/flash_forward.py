"""Forward pass of flash attention in Pallas: online softmax in fp32 (FlashAttention-2, arXiv 2307.08691)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bc2_jax.kernels.attention import MASKED
from bc2_jax.kernels.flash_tiles import LOG2_E, keep_causal, keep_visible, matmul, output, rotate
from bc2_jax.kernels.flash_tokens import Plan, fetched, kind, kind_of


def _kernel(
    # Scalars: what to do in each step (flash_tokens.Plan), ALiBi slopes times log2(e).
    query_blocks, key_blocks, steps, anchors, slopes,
    # Blocks [block, H] three times; of the row, segments and positions [blocks, 2, block] and with RoPE cos and signed
    # sin, fp32 [blocks, block, H].
    q_ref, k_ref, v_ref, rows_ref, rope_refs,
    # Results [block, H], and of the head [blocks, 1, block].
    out_ref, lse_ref,
    # fp32, for the block of queries: the result before division [block, H], largest score and total [block, lanes].
    out_sum, peak_ref, total_ref,
    # With RoPE: the blocks of queries and of keys, rotated.
    rotated_refs,
    *, chunk: int, alibi: bool, scale: float,
) -> None:  # fmt: skip
    b, n, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    i, j = query_blocks[step], key_blocks[step]
    todo = kind_of(steps[b * pl.num_programs(2) + step])
    block, H = q_ref.shape
    lanes = peak_ref.shape[1]

    def bias(of: Array) -> Array:
        """ALiBi of the tokens of a block, [1, block].

        Positions are counted from the middle of the block of queries: near tokens have small biases, and a constant per
        row of scores does not change the softmax.
        """
        anchor = anchors[b * rows_ref.shape[0] + i]
        return slopes[n] * (rows_ref[of, 1:] - anchor).astype(jnp.float32)

    if rope_refs:
        q_used, k_used = rotated_refs
        cos_ref, sin_ref = rope_refs
    else:
        q_used, k_used = q_ref, k_ref

    @pl.when(j == 0)
    def _() -> None:
        if rope_refs:
            q_used[...] = rotate(q_ref[...], cos_ref[i], sin_ref[i]).astype(q_ref.dtype)
        out_sum[...] = jnp.zeros_like(out_sum)
        peak_ref[...] = jnp.full_like(peak_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    def visit(*, diagonal: bool, mixed: bool) -> None:
        bias_1S = bias(j) if alibi else None
        if rope_refs:
            k_used[...] = rotate(k_ref[...], cos_ref[j], sin_ref[j]).astype(k_ref.dtype)
        for first in range(0, block, chunk):
            queries = slice(first, first + chunk)
            S = first + chunk if diagonal else block
            s_TS = matmul(q_used[queries], k_used[:S], (1, 1)) * (scale * LOG2_E)
            if bias_1S is not None:
                s_TS += bias_1S[:, :S]
            if mixed:
                s_TS = keep_visible(s_TS, rows_ref[i, :1, queries], rows_ref[j, :1, :S], key_axis=1)
            if diagonal:
                s_TS = keep_causal(s_TS, first, key_axis=1)
            old_peak = peak_ref[queries]
            peak = jnp.maximum(old_peak, s_TS.max(1, keepdims=True))
            p_TS = jnp.exp2(s_TS - across(peak, S))
            shrink = jnp.exp2(old_peak - peak)
            peak_ref[queries] = peak
            # One partial sum per lane; they are added once, at the end.
            total_ref[queries] = total_ref[queries] * shrink + sum(
                p_TS[:, lane : lane + lanes] for lane in range(0, S, lanes)
            )
            pv_TH = matmul(p_TS.astype(v_ref.dtype), v_ref[:S], (1, 0))
            out_sum[queries] = out_sum[queries] * across(shrink, H) + pv_TH

    for diagonal in (False, True):
        for mixed in (False, True):
            pl.when(todo == kind(diagonal, mixed))(functools.partial(visit, diagonal=diagonal, mixed=mixed))

    @pl.when(i == j)
    def _() -> None:
        peak = peak_ref[...]
        total = total_ref[...].sum(1, keepdims=True)
        # A query that saw only masked scores has summed 2^0 for each.
        seen = peak > MASKED / 2
        out = out_sum[...] * across(jnp.where(seen, 1 / total, 0.0), H)
        out_ref[...] = out.astype(out_ref.dtype)
        # All lanes are equal, so this is a row of the transpose.
        lse_1T = jnp.where(seen, peak + jnp.log2(total), 0.0).T[:1]
        if alibi:
            lse_1T = jnp.where(rows_ref[i, :1] == 0, 0.0, lse_1T - bias(i))
        lse_ref[i] = lse_1T


def across(column: Array, width: int) -> Array:
    """[T, lanes] with equal lanes -> [T, width]."""
    lanes = column.shape[1]
    return jnp.tile(column, (1, width // lanes)) if width > lanes else column[:, :width]


# Jitted, because JAX removes an unused function call, as after a remat policy that keeps the results, but not an unused
# pallas_call.
@functools.partial(jax.jit, static_argnames=("chunk", "alibi", "scale", "vmem_bytes", "interpret"))
def forward(
    q: Array, k: Array, v: Array, rows: Array, slopes: Array, plan: Plan, rope: tuple[Array, ...] = (),
    *, chunk: int, alibi: bool, scale: float, vmem_bytes: int, interpret: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """The result [B, N, T, H] in the dtype of v, and the log-sum-exp fp32 [B, N, T] in units of log2.

    q, k, v [B, N, T, H]; rows int32 [B, blocks, 2, block] (segments, ALiBi positions); slopes fp32 [N] times log2(e);
    rope: nothing, or cos and signed sin fp32 [B, blocks, block, H] by which q and k are rotated here.
    The log-sum-exp includes the bias slope * (key position - query position); it is 0 for a query that sees nothing.
    """
    B, N, T, H = q.shape
    blocks, block = rows.shape[1], rows.shape[3]
    num_steps = len(plan.query_blocks)
    # Width of the parts into which scores are cut.
    lanes = math.gcd(chunk, 128)

    def query(b, n, step, query_blocks, *_):
        return b, n, query_blocks[step], 0

    def key(b, n, step, query_blocks, key_blocks, steps, *_):
        return b, n, fetched(steps[b * num_steps + step]), 0

    q_spec, k_spec = (pl.BlockSpec((None, None, block, H), index) for index in (query, key))
    row_spec = pl.BlockSpec((None, blocks, 2, block), lambda b, *_: (b, 0, 0, 0))
    rope_spec = pl.BlockSpec((None, blocks, block, H), lambda b, *_: (b, 0, 0, 0))
    lse_spec = pl.BlockSpec((None, None, blocks, 1, block), lambda b, n, *_: (b, n, 0, 0, 0))
    scores = B * N * num_steps * block * block
    moved = 2 * num_steps * block * H * k.dtype.itemsize + 2 * T * H * q.dtype.itemsize + 4 * T
    out, lse = pl.pallas_call(
        functools.partial(_kernel, chunk=chunk, alibi=alibi, scale=scale),
        name="flash_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, N, num_steps),
            in_specs=[q_spec, k_spec, k_spec, row_spec, tuple(rope_spec for _ in rope)],
            out_specs=[q_spec, lse_spec],
            scratch_shapes=[
                pltpu.VMEM((block, H), jnp.float32),
                pltpu.VMEM((block, lanes), jnp.float32),
                pltpu.VMEM((block, lanes), jnp.float32),
                tuple(pltpu.VMEM((block, H), q.dtype) for _ in rope),
            ],
        ),
        out_shape=[output(q.shape, v.dtype, q), output((B, N, blocks, 1, block), jnp.float32, q)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(flops=4 * scores * H, transcendentals=scores, bytes_accessed=B * N * moved),
        interpret=interpret,
    )(*plan, slopes, q, k, v, rows, rope)
    return out, lse.reshape(B, N, T)
