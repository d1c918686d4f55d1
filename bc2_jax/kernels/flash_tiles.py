"""Operations of the flash attention kernels on one tile of scores; all but `output` run inside a kernel."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from bc2_jax.kernels.attention import MASKED
from bc2_jax.kernels.segments import trunk_of

# The hardware computes 2^x, not e^x: the factor goes into the scale of the scores.
LOG2_E = math.log2(math.e)

_NO_SEGMENT = -(2**31)


def matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """fp32 product over one axis of each; fp32 operands are not rounded to bf16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def broadcast_columns(row_1S: Array, lanes: int) -> Array:
    """[1, S] -> [S, lanes]: the row as a column, in each lane."""
    return jnp.broadcast_to(row_1S, (lanes, row_1S.shape[1])).T


def keep_visible(s: Array, queries_1T: Array, keys_1S: Array, key_axis: int) -> Array:
    """Scores of keys in the query's segment or its trunk; MASKED elsewhere and for padding."""
    down, across = (queries_1T, keys_1S) if key_axis == 1 else (keys_1S, queries_1T)
    lanes = min(128, s.shape[1])
    down_XL, is_padding = broadcast_columns(down, lanes), across == 0
    own, trunk = (down_XL, trunk_of(down_XL)) if key_axis == 1 else (across, trunk_of(across))

    def find(segments: Array, others: Array) -> Array:
        down_XL, across = (segments, others) if key_axis == 1 else (others, segments)
        # Changing one row is cheaper than changing the mask: padding across gets a segment that nothing down has.
        return jnp.tile(down_XL, (1, s.shape[1] // lanes)) == jnp.where(is_padding, _NO_SEGMENT, across)

    keys = across if key_axis == 1 else down_XL
    return jnp.where(find(own, keys) | find(trunk, keys), s, MASKED)


def keep_causal(s: Array, first: int, key_axis: int) -> Array:
    """Masks the square on the diagonal, which starts at key `first`; all queries see the keys before it."""
    corner = jax.lax.slice_in_dim(s, first, None, axis=key_axis)
    key, query = (jax.lax.broadcasted_iota(jnp.int32, corner.shape, axis) for axis in (key_axis, 1 - key_axis))
    corner = jnp.where(key <= query, corner, MASKED)
    return jnp.concatenate([jax.lax.slice_in_dim(s, 0, first, axis=key_axis), corner], key_axis) if first else corner


def rotate(x: Array, cos: Array, signed_sin: Array) -> Array:
    """RoPE in fp32 on [T, H] as in `model.position.apply_rope`: pairs (i, i + H / 2), `signed_sin` negated in the first
    half. With -`signed_sin` the inverse."""
    x = x.astype(jnp.float32)
    return x * cos + pltpu.roll(x, x.shape[1] // 2, 1) * signed_sin


def output(shape: tuple[int, ...], dtype, like: Array) -> jax.ShapeDtypeStruct:
    """Shape of an output that under shard_map varies over the same mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
