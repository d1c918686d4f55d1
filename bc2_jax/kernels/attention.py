"""Causal attention with segments and ALiBi in plain JAX: a reference and a chunked implementation.

Functions work on one device's rows and heads; `model/attention.py` places them on the mesh. Shapes: B batch, T query, S
key, N heads, H head size. A token sees earlier keys, and itself, in its segment or its trunk (`segments`), but no
padding; a query that sees nothing gives zeros, never NaN.

ALiBi (paper section 2.3) adds slope * (key position - query position) in fp32. The equivalent slope * key position
would be wrong by up to 8 in bf16 at 4k.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bc2_jax.kernels.segments import can_see
from bc2_jax.kernels.transposed import multiply_transposed

# Finite, so that a fully masked row never computes inf - inf.
MASKED = -1e30


class Tokens(NamedTuple):
    """Position and segment (`segments`) of each token, int32 [B, T]; segment 0 is padding."""

    positions: Array
    segments: Array


def _scores(
    q_BNTH: Array, k_BNSH: Array, q: Tokens, k: Tokens, slopes_N: Array | None, causal: Array
) -> tuple[Array, Array]:
    """fp32 scores with bias [B, N, T, S] and mask [B, 1, T, S]; `causal` is bool [T, S]."""
    scale = q_BNTH.shape[-1] ** -0.5
    s_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=jnp.float32) * scale
    if slopes_N is not None:
        distance_BTS = (k.positions[:, None, :] - q.positions[:, :, None]).astype(jnp.float32)
        s_BNTS += slopes_N.astype(jnp.float32)[:, None, None] * distance_BTS[:, None]
    mask = (can_see(q.segments[:, :, None], k.segments[:, None, :]) & causal)[:, None]
    return jnp.where(mask, s_BNTS, MASKED), mask


def reference_attention(q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, tokens: Tokens, slopes_N: Array | None) -> Array:
    """Attention as one einsum; holds fp32 scores [B, N, T, T]. Returns [B, T, N, H] in the dtype of v."""
    causal_TS = jnp.tri(q_BTNH.shape[1], dtype=bool)
    q_BNTH, k_BNTH = jnp.swapaxes(q_BTNH, 1, 2), jnp.swapaxes(k_BTNH, 1, 2)
    s_BNTS, mask = _scores(q_BNTH, k_BNTH, tokens, tokens, slopes_N, causal_TS)
    p_BNTS = jnp.where(mask, jnp.exp(s_BNTS - jax.lax.stop_gradient(s_BNTS.max(-1, keepdims=True))), 0.0)
    total = p_BNTS.sum(-1, keepdims=True)
    p_BNTS /= jnp.where(total == 0, 1.0, total)
    return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS.astype(v_BTNH.dtype), v_BTNH)


def chunked_attention(
    q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, tokens: Tokens, slopes_N: Array | None, *, block: int
) -> Array:
    """Attention with an online softmax over causal blocks (Rabe & Staats, arXiv 2112.05682).

    Holds [B, N, block, block] scores at a time; the backward pass recomputes them from the saved log-sum-exp. Any T:
    the last block is padded. Returns [B, T, N, H] in the dtype of v.
    """
    T = q_BTNH.shape[1]
    block = min(block, T)
    pad = -T % block
    qkv = [jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q_BTNH, k_BTNH, v_BTNH)]
    tokens = Tokens(*(jnp.pad(x, ((0, 0), (0, pad))) for x in tokens))
    out = _flash(*(_to_blocks(x, block) for x in qkv), *(_to_blocks(x, block) for x in tokens), slopes_N)
    return _from_blocks(out)[:, :T]


def _to_blocks(x: Array, block: int) -> Array:
    """[B, T, ...] -> [T / block, B, block, ...], with heads before the block: [T / block, B, N, block, H]."""
    x = jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)
    return jnp.swapaxes(x, 2, 3) if x.ndim == 5 else x


def _from_blocks(x: Array) -> Array:
    x = jnp.moveaxis(jnp.swapaxes(x, 2, 3), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _causal_pairs(num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(query block, key block) of every pair on or below the diagonal."""
    i, j = np.tril_indices(num_blocks)
    return i.astype(np.int32), j.astype(np.int32)


def _block_scores(i: Array, j: Array, q: Array, k: Array, positions: Array, segments: Array, slopes: Array | None):
    block = q.shape[3]
    causal = jnp.arange(block) + j * block <= jnp.arange(block)[:, None] + i * block
    return _scores(q[i], k[j], Tokens(positions[i], segments[i]), Tokens(positions[j], segments[j]), slopes, causal)


@jax.custom_vjp
def _flash(q: Array, k: Array, v: Array, positions: Array, segments: Array, slopes: Array | None) -> Array:
    return _flash_forward(q, k, v, positions, segments, slopes)[0]


def _flash_forward(q, k, v, positions, segments, slopes):
    def visit(carry, pair):
        i, j = pair

        def attend(out, peak, total):
            s, mask = _block_scores(i, j, q, k, positions, segments, slopes)
            new_peak = jnp.maximum(peak, s.max(-1))
            p = jnp.where(mask, jnp.exp(s - new_peak[..., None]), 0.0)
            shrink = jnp.exp(peak - new_peak)
            pv = jnp.einsum("BNTS,BNSH->BNTH", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return out * shrink[..., None] + pv, new_peak, total * shrink + p.sum(-1)

        # Skips blocks of other documents or branches.
        sees = can_see(segments[i][:, :, None], segments[j][:, None, :]).any()
        block = jax.lax.cond(sees, attend, lambda *block: block, *(x[i] for x in carry))
        return tuple(x.at[i].set(new) for x, new in zip(carry, block, strict=True)), None

    # Made from q, so that under shard_map they vary over the same mesh axes as what is added to them.
    zeros = jnp.zeros_like(q, jnp.float32)
    start = (zeros, zeros[..., 0] + MASKED, zeros[..., 0])
    (out, peak, total), _ = jax.lax.scan(visit, start, _causal_pairs(q.shape[0]))
    total = jnp.where(total == 0, 1.0, total)
    # Named, so that a remat policy can keep both and the backward pass need not repeat the forward pass.
    out = checkpoint_name((out / total[..., None]).astype(v.dtype), "attention")
    lse = checkpoint_name(peak + jnp.log(total), "attention_lse")
    return out, (q, k, v, positions, segments, slopes, out, lse)


def _flash_backward(residuals, d_out):
    q, k, v, positions, segments, slopes, out, lse = residuals
    scale = q.shape[-1] ** -0.5
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(carry, pair):
        i, j = pair
        dq, dk, dv = carry
        s, mask = _block_scores(i, j, q, k, positions, segments, slopes)
        p = jnp.where(mask, jnp.exp(s - lse[i][..., None]), 0.0)
        dp = matmul("BNTH,BNSH->BNTS", d_out[i], v[j])
        ds = (p * (dp - delta[i][..., None]) * scale).astype(q.dtype)
        dq = dq.at[i].add(matmul("BNTS,BNSH->BNTH", ds, k[j]))
        dk = dk.at[j].add(multiply_transposed("BNTS,BNTH->BNSH", ds, q[i]))
        dv = dv.at[j].add(multiply_transposed("BNTS,BNTH->BNSH", p.astype(v.dtype), d_out[i]))
        return (dq, dk, dv), None

    start = tuple(jnp.zeros_like(x, jnp.float32) for x in (q, k, v))
    grads, _ = jax.lax.scan(visit, start, _causal_pairs(q.shape[0]))
    # Positions, segments and slopes are not parameters.
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None, None


_flash.defvjp(_flash_forward, _flash_backward)
