"""Adam's moments stored in bf16, or in 8 bits with a scale a row; the arithmetic of an update stays fp32.

The codes follow block-wise 8-bit optimizers (Dettmers et al. 2021, section 2) with two changes. A block is a row, the
last dimension, so that codes and scales are sharded as the parameter is on every mesh. And codes are powers, not a
table: a table would be a gather, which is slow on a TPU. Optax has neither of these nor stochastic rounding.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Shorter rows stay fp32: their scales would cost as much as they save.
_SHORTEST_ROW = 32


class Int8(NamedTuple):
    """An array [..., n] as codes and the largest magnitude of each row.

    int8 codes c of a first moment stand for scale * sign(c) * (c / 127)^2, uint8 codes of a second moment for
    scale * (c / 255)^4. So steps are small near 0: Adam divides by the root of the second moment.
    """

    codes: Array
    """int8 or uint8 [..., n]."""
    scales: Array
    """fp32 [..., 1]."""


def has_codes(path: tuple, x: Array) -> bool:
    """Whether the moments of the parameter at this tree path are stored in 8 bits: all but norms and short rows."""
    return x.ndim > 1 and x.shape[-1] >= _SHORTEST_ROW and "norm" not in jax.tree_util.keystr(path)


def zeros(path: tuple, x: Array, dtype: str, signed: bool) -> Any:
    """The stored moment 0 of a parameter, laid out as it."""
    if dtype == "bfloat16":
        return jnp.zeros_like(x, dtype=jnp.bfloat16)
    if not has_codes(path, x):
        return jnp.zeros_like(x)
    scales = jax.eval_shape(_row_scales, x)
    return Int8(jnp.zeros_like(x, dtype=jnp.int8 if signed else jnp.uint8), jnp.zeros_like(scales))


def store(path: tuple, x: Array, dtype: str, signed: bool, bits: Array | None) -> Any:
    """An fp32 moment in its stored form.

    `bits`, uint32 as `x`, round it up or down such that the expectation is `x` (16 of them are used, others for the
    second moment than for the first); None rounds bf16 to nearest.
    """
    if bits is not None and not signed:
        bits = bits >> 16
    if dtype == "bfloat16":
        return x.astype(jnp.bfloat16) if bits is None else round_to_bf16(x, bits)
    return to_int8(x, bits, signed) if bits is not None and has_codes(path, x) else x


def load(stored: Any) -> Any:
    """The fp32 moments of a tree of stored ones."""
    return jax.tree.map(
        lambda x: from_int8(x) if isinstance(x, Int8) else x.astype(jnp.float32), stored,
        is_leaf=lambda x: isinstance(x, Int8),
    )  # fmt: skip


def random_bits(path: tuple, x: Array, step: Array) -> Array:
    """uint32 like `x`: a function of the parameter's path, the step and each element's position alone.

    So a resumed run rounds as the one that was not stopped, and every mesh rounds alike.
    """
    key = jax.random.fold_in(jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode())), step)
    sharding = jax.typeof(x).sharding
    return jax.random.bits(key, x.shape, jnp.uint32, out_sharding=None if sharding.mesh.empty else sharding)


def round_to_bf16(x: Array, bits: Array) -> Array:
    """fp32 -> bf16 by the low 16 bits of `bits`: they are added to the 16 bits that bf16 lacks, and may carry."""
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
    return jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def to_int8(x: Array, bits: Array, signed: bool) -> Int8:
    """fp32 [..., n] -> codes, by the low 16 bits of `bits`. A positive second moment never becomes 0."""
    top, power = (127, 2) if signed else (255, 4)
    scales = _row_scales(x)
    share = jnp.abs(x) / jnp.where(scales > 0, scales, 1.0)
    root = jnp.sqrt(share) if signed else jnp.sqrt(jnp.sqrt(share))
    low = jnp.minimum(jnp.floor(root * top), top - 1)
    below, above = (low / top) ** power, ((low + 1) / top) ** power
    chance = (share - below) / (above - below)
    code = low + ((bits & 0xFFFF).astype(jnp.float32) < chance * 65536)
    if signed:
        return Int8((jnp.sign(x) * code).astype(jnp.int8), scales)
    return Int8(jnp.where(x > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scales)


def from_int8(stored: Int8) -> Array:
    """The fp32 array [..., n] that the codes stand for."""
    codes = stored.codes.astype(jnp.float32)
    if stored.codes.dtype == jnp.int8:
        return stored.scales * jnp.sign(codes) * (codes / 127) ** 2
    return stored.scales * (codes / 255) ** 4


def _row_scales(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=-1, keepdims=True)
