"""Position embeddings: RoPE tables and rotation (7B), ALiBi slopes (13B); paper section 2.3."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array


def make_rope(positions_BT: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """fp32 (cos, sin) [B, T, 1, H / 2] of the rotation angle of each position.

    Always fp32: in bf16 positions collide from 257 on, and the cos table is wrong by up to 2.0 at 4096.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: Array, rope: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H / 2), in fp32, and casts back to the dtype of x."""
    cos, sin = rope
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """fp32 slopes [N]: for n heads a power of two 2^(-8 h / n), h = 1..n; otherwise those of the closest power of two
    below, then every other slope of the next one (ALiBi, arXiv 2108.12409, and the released 13B code).
    """

    def power_of_two_slopes(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    closest = 2 ** math.floor(math.log2(num_heads))
    rest = power_of_two_slopes(2 * closest)[::2][: num_heads - closest]
    return np.concatenate([power_of_two_slopes(closest), rest]).astype(np.float32)
