"""Position embeddings: RoPE tables and rotation (7B), ALiBi slopes (13B); paper section 2.3."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def make_rope(positions_BT: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """fp32 (cos, sin) [B, T, 1, H] of the rotation angle of each position, as `apply_rope` multiplies with them: the
    angles of the first half are repeated in the second, and the sines of the first are negated.

    Always fp32: in bf16 positions collide from 257 on, and the cos table is wrong by up to 2.0 at 4096.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def apply_rope(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H / 2), in fp32, and casts back to the dtype of x."""
    cos, sin = rope
    # The halves change places in a matmul, exactly: each sum has one term. TPU has 128 lanes, and halves of 64 would be
    # cut out and put together in copies: a quarter more time for projection and rotation, three times the memory.
    swap_HH = jnp.roll(jnp.eye(x_BTNH.shape[-1], dtype=x_BTNH.dtype), x_BTNH.shape[-1] // 2, axis=1)
    swapped_BTNH = jnp.einsum(
        "BTNH,HK->BTNK", x_BTNH, swap_HH, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return (x_BTNH.astype(jnp.float32) * cos + swapped_BTNH * sin).astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """fp32 slopes [N]: for n heads a power of two 2^(-8 h / n), h = 1..n; otherwise those of the closest power of two
    below, then every other slope of the next one (ALiBi, arXiv 2108.12409, and the released 13B code).
    """

    def power_of_two_slopes(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    closest = 2 ** math.floor(math.log2(num_heads))
    rest = power_of_two_slopes(2 * closest)[::2][: num_heads - closest]
    return np.concatenate([power_of_two_slopes(closest), rest]).astype(np.float32)
