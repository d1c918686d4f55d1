"""Matmuls that sum over the rows of both operands, such as the gradient of a weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bc2_jax.sharding import platform


def multiply_transposed(equation: str, x: Array, y: Array, dtype: Any = jnp.float32) -> Array:
    """einsum(equation, x, y) computed and returned in `dtype`; `x`'s last dimension is not summed, as in x.T @ y.

    The equation names every dimension, as in "TD,TV->DV". On a CPU `x` is copied first: XLA:CPU has a fast bf16 kernel
    for rows times columns, but not for a transposed left side.
    """
    if platform() != "cpu":
        return jnp.einsum(equation, x, y, preferred_element_type=dtype)
    inputs, out = equation.split("->")
    x_dims, y_dims = inputs.split(",")
    moved = "".join(sorted(x_dims, key=lambda dim: dim not in out))  # what is summed last
    # The barrier keeps XLA from folding the transposition back; the batch dimension of 1 gives the copy a plain layout.
    x_t = jax.lax.optimization_barrier(jnp.transpose(x, [x_dims.index(dim) for dim in moved]))
    result = jnp.einsum(f"Z{moved},Z{y_dims}->Z{out}", x_t[None], y[None], preferred_element_type=dtype)[0]
    # And this one from folding a transposition of the result into a matmul that its runtime does not know in bf16.
    return jax.lax.optimization_barrier(result)
