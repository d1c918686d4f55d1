"""Flash attention in Pallas for TPU, with ALiBi and segments computed inside the kernels.

Same function and conventions as `attention.chunked_attention`, on one device's rows and heads. No scores reach device
memory. ALiBi costs one fp32 addition per score: under the causal softmax, slope * (key position - query position)
equals slope * key position plus a constant of the row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.blocks import BlockSizes, choose_blocks
from bc2_jax.kernels.flash_backward import backward
from bc2_jax.kernels.flash_forward import forward
from bc2_jax.kernels.flash_tiles import LOG2_E
from bc2_jax.kernels.flash_tokens import alibi_positions, plan_forward
from bc2_jax.sharding import current_chip

HEAD_SIZES = (64, 128)
"""Head sizes that the compiled kernels support."""
ROTATED_LENGTH = 8192
"""Longest row that the kernels rotate (RoPE) themselves: they keep its cosines and sines in vector memory."""


class _Static(NamedTuple):
    blocks: BlockSizes
    alibi: bool
    scale: float
    interpret: bool


def flash_attention(
    q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, tokens: Tokens, slopes_N: Array | None, *,
    rope: tuple[Array, Array] | None = None, blocks: BlockSizes | None = None, interpret: bool = False,
) -> Array:  # fmt: skip
    """Causal self-attention within segments, differentiable in q, k and v (FlashAttention-2, arXiv 2307.08691).

    q, k, v: [B, T, N, H], all bf16 or all fp32; any T; H is 64 or 128. `slopes_N` are ALiBi slopes (arXiv 2108.12409),
    fp32 [N]. With `rope` (cosines and signed sines of `model.position.make_rope`, fp32 [B, T, 1, H] each) the kernels
    rotate q and k, where `rotates` allows it; without, q and k are used as they are. `blocks` defaults to the table of
    `blocks.py` for the chip of the mesh in use. `interpret` runs the kernels without a TPU, for tests, with any H.
    Scores, softmax and sums are fp32. Returns [B, T, N, H] in the dtype of v.

    The result and log-sum-exp are named "attention" and "attention_lse": a remat policy that keeps both saves a second
    forward kernel. Raises ValueError for unsupported head sizes, dtypes and lengths
    with `rope`.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    if not interpret and H not in HEAD_SIZES:
        sizes = " or ".join(map(str, HEAD_SIZES))
        raise ValueError(f"A head size of {H} is not supported by the TPU kernel: it must be {sizes}.")
    if rope is not None and not interpret and not rotates(T, H):
        raise ValueError(
            f"Rows of {T} tokens with heads of {H} are not rotated by the TPU kernel: it rotates heads of 128 in "
            f"rows of at most {ROTATED_LENGTH} tokens."
        )
    dtypes = {x.dtype for x in (q_BTNH, k_BTNH, v_BTNH)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"q, k and v of dtype {names} are not supported: all must be bfloat16 or all float32.")
    blocks = blocks or choose_blocks(current_chip(), H, T)
    # A TPU tile is 128 lanes wide.
    blocks = blocks.fit(T, 8 if interpret else 128)
    pad = blocks.padded(T) - T
    q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q_BTNH, k_BTNH, v_BTNH))
    segments = jnp.pad(tokens.segments.astype(jnp.int32), ((0, 0), (0, pad)))
    positions = jnp.zeros_like(segments)
    slopes = jnp.zeros(q.shape[1], jnp.float32)
    if slopes_N is not None:
        positions = jnp.pad(alibi_positions(tokens).astype(jnp.int32), ((0, 0), (0, pad)))
        slopes = slopes_N.astype(jnp.float32) * LOG2_E
    tables: tuple[Array, ...] = ()
    if rope is not None:
        padded = (jnp.pad(x[:, :, 0], ((0, 0), (0, pad), (0, 0))) for x in rope)
        tables = tuple(x.reshape(x.shape[0], -1, blocks.forward, H) for x in padded)
    static = _Static(blocks, slopes_N is not None, H**-0.5, interpret)
    out_BNTH = _flash(q, k, v, segments, positions, slopes, tables, static)
    return jnp.swapaxes(out_BNTH[:, :, :T], 1, 2)


def rotates(length: int, head_dim: int) -> bool:
    """Whether the kernels apply RoPE themselves, which spares a pass over q and k in device memory each way."""
    return head_dim == 128 and length <= ROTATED_LENGTH


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _flash(
    q: Array, k: Array, v: Array, segments: Array, positions: Array, slopes: Array, rope: tuple[Array, ...],
    static: _Static,
) -> Array:  # fmt: skip
    """q, k, v, result [B, N, T, H], T in whole blocks; segments and positions [B, T]; slopes times log2(e); rope: () or
    two tables [B, blocks, block, H]."""
    return _forward(q, k, v, segments, positions, slopes, rope, static)[0]


def _blocked(rope: tuple[Array, ...], block: int) -> tuple[Array, ...]:
    """The tables in blocks of another size."""
    return tuple(x.reshape(x.shape[0], -1, block, x.shape[3]) for x in rope)


def _rows(segments: Array, positions: Array, block: int) -> Array:
    """[B, T] twice -> [B, blocks, 2, block]."""
    return jnp.stack([x.reshape(x.shape[0], -1, block) for x in (segments, positions)], axis=2)


def _forward(q, k, v, segments, positions, slopes, rope, static: _Static):
    sizes = static.blocks
    plan = plan_forward(segments, positions, sizes.forward)
    out, lse = forward(
        q, k, v, _rows(segments, positions, sizes.forward), slopes, plan, _blocked(rope, sizes.forward),
        chunk=sizes.forward_chunk, alibi=static.alibi, scale=static.scale, vmem_bytes=sizes.vmem_mib << 20,
        interpret=static.interpret,
    )  # fmt: skip
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, positions, slopes, rope, out, lse)


def _backward(static: _Static, residuals, d_out: Array):
    q, k, v, segments, positions, slopes, rope, out, lse = residuals
    sizes = static.blocks
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    gradients = backward(
        q, k, v, d_out, lse, delta, _rows(segments, positions, sizes.backward), slopes, _blocked(rope, sizes.backward),
        span=max(1, sizes.span // sizes.backward), chunk=sizes.backward_chunk,
        diagonal_chunk=sizes.backward_diagonal_chunk, alibi=static.alibi, scale=static.scale,
        vmem_bytes=sizes.vmem_mib << 20, interpret=static.interpret,
    )  # fmt: skip
    # Segments, positions, slopes and angles are not parameters.
    return *gradients, None, None, None, jax.tree.map(lambda _: None, rope)


_flash.defvjp(_forward, _backward)
