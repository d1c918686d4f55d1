"""Matmuls against a weight as einsum equations whose letters name axes.

B batch, T tokens, D model dimension, N heads, H head size, F feed-forward, V vocabulary, R rank of an adapter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bc2_jax.sharding import platform

# The logical axis of each letter, in a weight and in an activation; None is never sharded.
WEIGHT_AXES = {"D": "embed", "N": "heads", "H": "head_dim", "F": "ffn", "V": "vocab", "R": None}
ACTIVATION_AXES = {**WEIGHT_AXES, "B": "batch", "T": "sequence", "D": "hidden"}
# The equation of each weight of a layer, as it is stored.
EQUATIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "BTD,DNH->BTNH"), "o_proj": "BTNH,NHD->BTD",
    **dict.fromkeys(("gate_proj", "up_proj"), "BTD,DF->BTF"), "down_proj": "BTF,FD->BTD",
}  # fmt: skip


def split_equation(equation: str) -> tuple[str, str, str]:
    """The letters of x, weight and y."""
    operands, y = equation.split("->")
    x, w = operands.split(",")
    return x, w, y


def move_model_axis_behind(equation: str) -> str:
    """The equation of a weight [D, ...] with its first two dimensions swapped."""
    x, w, y = split_equation(equation)
    return f"{x},{w[1]}{w[0]}{w[2:]}->{y}"


def move_to_front(equation: str, axis: int) -> str:
    """The equation with this dimension of the weight as its first."""
    x, w, y = split_equation(equation)
    return f"{x},{w[axis]}{w[:axis]}{w[axis + 1 :]}->{y}"


def weight_axes(equation: str) -> tuple[str | None, ...]:
    """Logical axes of one layer's weight."""
    return tuple(WEIGHT_AXES[letter] for letter in split_equation(equation)[1])


class Dimensions(NamedTuple):
    """The letters of an equation by role."""

    x: str
    y: str
    into: str
    """Summed dimensions of the weight."""
    out: str
    """The weight's other dimensions, in order."""

    @classmethod
    def of(cls, equation: str) -> Dimensions:
        x, w, y = split_equation(equation)
        return cls(x, y, "".join(c for c in w if c in x), "".join(c for c in w if c not in x))

    @property
    def equation_a(self) -> str:
        return f"{self.x},{self.into}R->BTR"

    @property
    def equation_b(self) -> str:
        return f"BTR,R{self.out}->{self.y}"


def sum_dtype(equation: str, x: Array) -> jnp.dtype:
    """Dtype of the matmul's result: fp32; on TPU, where partial results are summed over devices, that of x.

    That halves the traffic; each chip's own sum is fp32 in either case.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or platform() != "tpu":
        return jnp.dtype(jnp.float32)
    x_dims, _, y_dims = split_equation(equation)
    spec = jax.typeof(x).sharding.spec  # type: ignore[attr-defined]  # jax declares the base class
    cut = [axes for dim, axes in zip(x_dims, spec, strict=True) if dim not in y_dims and axes is not None]
    sizes = [mesh.shape[axis] for axes in cut for axis in ((axes,) if isinstance(axes, str) else axes)]
    return x.dtype if math.prod(sizes) > 1 else jnp.dtype(jnp.float32)
