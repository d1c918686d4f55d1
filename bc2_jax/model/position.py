"""Position embeddings: RoPE (7B) and ALiBi (13B), paper section 2.3; their stretching for long contexts."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class LongContext(NamedTuple):
    """How to read sequences longer than the trained length without training.

    A sequence of `stretch` times that length uses other slopes or frequencies from its first token on. The resulting
    quality was not measured.
    """

    method: Literal["ntk", "yarn"]
    """"ntk" stretches ALiBi's slopes (github.com/keezen/ntk_alibi) or RoPE's base ("dynamic NTK"), near tokens least;
    "yarn" is for RoPE only (arXiv 2309.00071)."""
    max_length: int
    """Tokens of the longest sequence."""


def stretch_of(tokens: int, trained: int) -> float:
    """Length of a sequence, new tokens included, over the trained length; at least 1."""
    return max(tokens / trained, 1.0)


def stretch_slopes(slopes_N: np.ndarray, stretch_R: Array) -> Array:
    """fp32 [R, N]: ALiBi's slopes; the steepest unchanged, the flattest divided by stretch, geometric in between."""
    share_N = jnp.asarray(np.argsort(np.argsort(-slopes_N, kind="stable")) / max(len(slopes_N) - 1, 1), jnp.float32)
    return jnp.asarray(slopes_N) / stretch_R[:, None] ** share_N


def stretch_rope(
    positions_RT: Array, head_dim: int, theta: float, trained: int, stretch_R: Array, method: str
) -> tuple[Array, Array]:
    """`make_rope` for rows stretched from `trained` tokens on; equal to it where stretch is 1."""
    frequencies = _frequencies(head_dim, theta)
    stretch_R1 = stretch_R[:, None]
    if method == "ntk":
        base_R1 = theta * stretch_R1 ** (head_dim / (head_dim - 2))
        stretched = base_R1 ** -jnp.asarray(np.arange(0, head_dim, 2) / head_dim, jnp.float32)
        scale_R1 = jnp.ones_like(stretch_R1)
    else:
        turns = trained * frequencies / (2 * math.pi)
        keep = np.clip((turns - 1) / (32 - 1), 0, 1).astype(np.float32)
        stretched = jnp.asarray(frequencies * keep) + frequencies * (1 - keep) / stretch_R1
        scale_R1 = 0.1 * jnp.log(stretch_R1) + 1  # on q and on k: their product has its square
    frequencies_RH = jnp.where(stretch_R1 == 1, frequencies, stretched)
    cos, sin = _rotation(positions_RT, frequencies_RH[:, None, None])
    scale_R = scale_R1[..., None, None]
    return cos * scale_R, sin * scale_R


def make_rope(positions_BT: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """fp32 (cos, sin) [B, T, 1, H] of each position's rotation angles, in the form for `apply_rope`.

    The angles of the first half are repeated in the second, with the sines of the first negated. Always fp32: in bf16
    positions collide from 257 on, and cos is wrong by up to 2.0 at 4096.
    """
    return _rotation(positions_BT, _frequencies(head_dim, theta))


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    return (theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def _rotation(positions_BT: Array, frequencies: Array | np.ndarray) -> tuple[Array, Array]:
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def apply_rope(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H / 2) in fp32; returns the dtype of x."""
    cos, sin = rope
    # A matmul swaps the halves, exactly: each sum has one term. A TPU has 128 lanes; slicing halves of 64 would copy: a
    # quarter more time for projection and rotation, three times the memory.
    swap_HH = jnp.roll(jnp.eye(x_BTNH.shape[-1], dtype=x_BTNH.dtype), x_BTNH.shape[-1] // 2, axis=1)
    swapped_BTNH = jnp.einsum(
        "BTNH,HK->BTNK", x_BTNH, swap_HH, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return (x_BTNH.astype(jnp.float32) * cos + swapped_BTNH * sin).astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """fp32 slopes [N] (ALiBi, arXiv 2108.12409, and the released 13B code).

    For n heads, a power of two: 2^(-8 h / n), h = 1..n. Otherwise those of the next smaller power of two, then every
    other slope of the next larger one.
    """

    def power_of_two_slopes(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    closest = 2 ** math.floor(math.log2(num_heads))
    rest = power_of_two_slopes(2 * closest)[::2][: num_heads - closest]
    return np.concatenate([power_of_two_slopes(closest), rest]).astype(np.float32)
