"""Flash attention on an NVIDIA GPU by cuDNN, with segments as a mask and ALiBi as further columns of q and k.

Same function as `attention.chunked_attention`, on one device's rows and heads, through `jax.nn.dot_product_attention`.
cuDNN knows neither segments nor these slopes. Rows of several documents get a mask, bf16 [B, 1, T, T], 32 MiB for a row
of 4096 tokens, and blocks between documents are computed and then masked; rows of one document need none. ALiBi as a
bias would be bf16 [B, N, T, T], 1.3 GiB for a row of the 13B model, and rounded to three digits. As columns it costs 8
more entries of each head, and is exact to fp32.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.flash_tokens import alibi_positions
from bc2_jax.kernels.segments import can_see
from bc2_jax.validation import require

COLUMNS = 8
"""Columns that ALiBi adds to a head: six, and two of zeros, because cuDNN takes multiples of 8."""
HEAD_LIMIT, HOPPER_HEAD_LIMIT = 128, 256
"""Widest head of cuDNN's kernels, with ALiBi's columns: before compute capability 9.0, and from there on."""
LONGEST = 2**16
"""Most tokens of a row with ALiBi: positions are two digits to the base 256, which bf16 holds exactly."""
PRIMITIVE = "dot_product_attention_fwd"
"""Start of the name of JAX's primitive of the forward kernel; a remat policy that keeps its results (the attention and
its log-sum-exp) saves a second forward kernel."""


def cudnn_attention(
    q_BTNH: Array, k_BTNH: Array, v_BTNH: Array, tokens: Tokens, slopes_N: Array | None, *,
    implementation: Literal["cudnn", "xla"] = "cudnn", limit: int | None = None,
) -> Array:  # fmt: skip
    """Causal self-attention within segments, differentiable in q, k and v.

    q, k, v: bf16 [B, T, N, H], H a multiple of 8, T even. `slopes_N` are ALiBi slopes, fp32 [N]; with None, q and k
    must already be rotated. `limit` is the widest head of the kernels, by default that of the GPUs of this process.
    "xla" computes the same call with JAX's own attention, for tests without a GPU, in any dtype. Returns [B, T, N, H]
    in the dtype of v. Raises ValueError for what cuDNN does not support.
    """
    T, H, alibi = q_BTNH.shape[1], q_BTNH.shape[3], slopes_N is not None
    if implementation == "cudnn":
        check_cudnn(str(q_BTNH.dtype), H, alibi, head_limit(jax.devices()) if limit is None else limit)
    legal = "with compute.attention = 'flash' on a GPU it must be even" + (f", at most {LONGEST}" if alibi else "")
    require(T % 2 == 0 and not (alibi and T > LONGEST), "row length", T, legal)
    scale = H**-0.5
    q, k, v = q_BTNH, k_BTNH, v_BTNH
    if slopes_N is not None:
        q, k = add_alibi(q, k, tokens, slopes_N / scale)
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, COLUMNS)))

    def attend(mask: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=scale, is_causal=True, implementation=implementation
        )  # fmt: skip

    def attend_documents() -> Array:
        mask_B1TS = can_see(tokens.segments[:, :, None], tokens.segments[:, None, :])[:, None]
        # Padding sees nothing; cuDNN then averages all values.
        return jnp.where((tokens.segments != 0)[..., None, None], attend(mask_B1TS), 0)

    out = jax.lax.cond(jnp.all(tokens.segments == 1), lambda: attend(None), attend_documents)
    return checkpoint_name(out[..., :H], "attention")


def add_alibi(q_BTNH: Array, k_BTNH: Array, tokens: Tokens, slopes_N: Array) -> tuple[Array, Array]:
    """q and k [B, T, N, H + COLUMNS] whose products also contain slope * key position, in fp32.

    A causal softmax takes that for slope * (key position - query position), since they differ by a constant of the
    query. Each slope is the sum of three bf16 numbers, each position of two, 256 a + b: all six products are exact.
    """
    positions_BT = alibi_positions(tokens)
    positions_BT -= jnp.min(jnp.where(tokens.segments == 0, jnp.iinfo(jnp.int32).max, positions_BT), 1, keepdims=True)
    positions_BT = jnp.where(tokens.segments == 0, 0, positions_BT)
    terms, rest = [], slopes_N.astype(jnp.float32)
    for _ in range(3):
        # Not a cast there and back, which the compiler may remove.
        terms.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - terms[-1]
    digits = (positions_BT // 256 * 256, positions_BT % 256)
    zeros = COLUMNS - len(terms) * len(digits)
    q_NC = jnp.stack([*terms, *terms, *[jnp.zeros_like(rest)] * zeros], -1).astype(q_BTNH.dtype)
    k_columns = [digits[0]] * len(terms) + [digits[1]] * len(terms) + [jnp.zeros_like(positions_BT)] * zeros
    k_BTC = jnp.stack(k_columns, -1).astype(k_BTNH.dtype)
    shape = (*q_BTNH.shape[:3], COLUMNS)
    return (
        jnp.concatenate([q_BTNH, jnp.broadcast_to(q_NC, shape)], -1),
        jnp.concatenate([k_BTNH, jnp.broadcast_to(k_BTC[:, :, None], shape)], -1),
    )


def head_limit(devices: list[Any]) -> int:
    """The widest head of cuDNN's kernels on these devices; of unknown ones the smaller limit."""
    capabilities = [float(getattr(device, "compute_capability", 0) or 0) for device in devices]
    return HOPPER_HEAD_LIMIT if min(capabilities) >= 9.0 else HEAD_LIMIT


def check_cudnn(dtype: str, head_dim: int, alibi: bool, limit: int) -> None:
    """Raises ValueError for heads that cuDNN's kernels do not compute."""

    def check(ok: bool, legal: str) -> None:
        require(ok, "compute.attention", "flash", f"{legal}; compute.attention = 'chunked' computes all")

    check(dtype in ("bfloat16", "float16"), f"cuDNN computes in bfloat16, not in {dtype}")
    check(head_dim % 8 == 0, f"cuDNN takes heads of a multiple of 8, not of {head_dim}")
    what = f"heads of {head_dim}" + (f" and the {COLUMNS} columns of ALiBi" if alibi else "")
    check(head_dim + COLUMNS * alibi <= limit, f"cuDNN takes heads of at most {limit} on this GPU, not {what}")
