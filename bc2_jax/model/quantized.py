"""Weights in 8 or 4 bits for a model laid out for decoding (`model/layout.py`).

A weight is scale * q, with q rounded to nearest. int8 has one scale per output; int4 has one per output and group of
128 inputs, with groups as the first dimension: the layout that TPUs read from memory without a copy
(docs/quantization.md). Inputs are multiplied with q in their own dtype, and the fp32 sums with the scale.

Values do not depend on the mesh: inputs are cut into up to PARTS equal parts and each part into groups, the last one
padded with zeros. On a mesh with more parts the weight becomes int8.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bc2_jax.model.equations import ACTIVATION_AXES, WEIGHT_AXES, Dimensions, split_equation, sum_dtype
from bc2_jax.sharding import gather, mesh_axes, named_sharding, parts, reshard, spec

Scheme = Literal["int8", "int4"]

GROUP = 128
"""Inputs per int4 scale: the lanes of a TPU's tile."""
PARTS = 8
"""Maximum number of shards of the inputs of an int4 weight: the chips of one host."""
FEW_TOKENS = 64
"""Up to this many tokens per device the sums of int4 groups are scaled, beyond it the weights: the cost of scaling sums
grows with the tokens."""


def item_bytes(dtype: jnp.dtype) -> float:
    """Bytes of an element on a TPU and in our files: two int4 values share a byte."""
    return 0.5 if dtype == jnp.int4 else dtype.itemsize


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of arrays or their shapes."""
    return sum(int(x.size * item_bytes(x.dtype)) for x in jax.tree.leaves(tree))


class Groups(NamedTuple):
    """Grouping of the inputs of an int4 weight: `parts` equal parts of `each` groups of `size` inputs."""

    parts: int
    each: int
    size: int

    @classmethod
    def of(cls, inputs: int, first: int) -> Groups:
        """`first` is the size of the input dimension that a mesh may shard, `inputs` that of all input dimensions.

        `parts` is the largest of 8, 4, 2, 1 that divides `first` and leaves each part at least one full group.
        """
        fitting = (n for n in (PARTS, 4, 2, 1) if n == 1 or (first % n == 0 and inputs // n >= GROUP))
        count = next(fitting)
        return cls(count, math.ceil(inputs / count / GROUP), min(GROUP, inputs // count))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["q", "scale"], meta_fields=["groups"])
@dataclasses.dataclass(frozen=True)
class Quantized:
    """The value of a quantized `weight`: a pytree of two arrays."""

    q: Array
    """int8 in the order of the weight's equation, or int4 [G, outputs..., K] of G groups of K inputs; stacked weights
    have L in front."""
    scale: Array
    """fp32 [outputs...], or [G, outputs...]; with the L of `q`."""
    groups: Groups | None = None
    """None for int8."""

    def __getitem__(self, index: object) -> Quantized:
        """Itself: parameters are read by `[...]`."""
        if index is not ...:
            raise TypeError(f"a quantized weight is read by [...], not by [{index!r}]")
        return self

    def whole(self, equation: str) -> Quantized:
        """Stacked weights gathered along the model dimension."""
        dims = Dimensions.of(equation)
        axes = {letter: None if letter == "D" else WEIGHT_AXES[letter] for letter in split_equation(equation)[1]}
        out = tuple(axes[letter] for letter in dims.out)
        if self.groups is None:
            q_axes, scale_axes = tuple(axes.values()), out
        else:
            q_axes, scale_axes = (axes[dims.into[0]], *out, None), (axes[dims.into[0]], *out)
        q, scale = reshard(self.q, "layers", *q_axes), reshard(self.scale, "layers", *scale_axes)
        return dataclasses.replace(self, q=q, scale=scale)

    def multiply(self, equation: str, x: Array) -> Array:
        """einsum(equation, x, weight) in fp32 with one layer's weight; letters as in `layers.Linear`."""
        return _sum_outputs(equation, x, self) if self.groups is None else _sum_groups(equation, x, self)


def _sum_outputs(equation: str, x: Array, weight: Quantized) -> Array:
    _, w, y = split_equation(equation)
    q, scale = (
        gather(array, *(WEIGHT_AXES[letter] for letter in letters))
        for array, letters in ((weight.q, w), (weight.scale, Dimensions.of(equation).out))
    )
    sums = jnp.einsum(
        equation, x, q.astype(x.dtype), preferred_element_type=sum_dtype(equation, x),
        out_sharding=named_sharding(*(ACTIVATION_AXES[letter] for letter in y)),
    )  # fmt: skip
    return sums.astype(jnp.float32) * scale


def _sum_groups(equation: str, x: Array, weight: Quantized) -> Array:
    dims, groups = Dimensions.of(equation), weight.groups
    assert groups is not None
    first = dims.into[0]
    stored = (WEIGHT_AXES[first], *(WEIGHT_AXES[letter] for letter in dims.out))
    q, scale = gather(weight.q, *stored, None), gather(weight.scale, *stored)
    if named_sharding() is None:
        return _multiply_groups(x, q, scale, groups, dims.out)
    axis = _axis_of(ACTIVATION_AXES, first)
    cut = parts(axis)
    if groups.parts % cut:
        raise ValueError(
            f"An int4 weight whose inputs are in {groups.parts} parts cannot be used on a mesh that cuts them into "
            f"{cut}: use int8."
        )
    own, dtype = groups._replace(parts=groups.parts // cut), sum_dtype(equation, x)
    summed = mesh_axes(axis) if cut > 1 else ()

    def multiply(x: Array, q: Array, scale: Array) -> Array:
        sums = _multiply_groups(x, q, scale, own, dims.out)
        return jax.lax.psum(sums.astype(dtype), summed).astype(jnp.float32) if summed else sums

    used = [ACTIVATION_AXES[letter] for letter in first + dims.out]
    x_spec, y_spec = (spec(*(ACTIVATION_AXES[letter] for letter in letters)) for letters in (dims.x, dims.y))
    return jax.shard_map(multiply, in_specs=(x_spec, spec(*used, None), spec(*used)), out_specs=y_spec)(x, q, scale)


def _axis_of(axes: Mapping[str, str | None], letter: str) -> str:
    """The logical axis of the first input dimension of a weight; never None."""
    axis = axes[letter]
    assert axis is not None
    return axis


def _multiply_groups(x: Array, q: Array, scale: Array, groups: Groups, out: str) -> Array:
    """fp32 [B, T, outputs...] of one device's x [B, T, inputs...]; `out` are the letters of the outputs."""
    B, T = x.shape[:2]
    x = x.reshape(B, T, groups.parts, -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, groups.each * groups.size - x.shape[3])))
    x_BTGK = x.reshape(B, T, -1, groups.size)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if B * T <= FEW_TOKENS:
        sums = einsum(f"BTGK,G{out}K->GBT{out}", x_BTGK, q.astype(x.dtype))
        return (sums * scale[:, None, None]).sum(axis=0)
    w = (q.astype(jnp.float32) * scale[..., None]).astype(x.dtype)
    return einsum(f"BTGK,G{out}K->BT{out}", x_BTGK, w)


# ---------------------------------------------------------------------------------------------------------- quantizing


def quantize_linear(w: Array, stored: str, used: str, scheme: Scheme) -> Quantized:
    """A weight [L, ...] in the order of the equation `stored`, quantized for the equation `used`.

    The same values on every mesh, sharded like the weight; one layer at a time is in fp32.
    """
    letters, dims = split_equation(stored)[1], Dimensions.of(used)
    size = dict(zip(letters, w.shape[1:], strict=True))
    if scheme == "int4":
        groups = Groups.of(math.prod(size[c] for c in dims.into), size[dims.into[0]])
        if groups.parts % parts(_axis_of(ACTIVATION_AXES, dims.into[0])) == 0:
            return _to_int4(w, letters, dims, groups)
    return _to_int8(w, letters, used)


def quantize_rows(rows_VD: Array) -> Quantized:
    """A head's rows as int8 with a scale each; same layout."""
    q, scale = _round_outputs(rows_VD, (1,))
    return Quantized(q, scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _to_int8(w: Array, letters: str, used: str) -> Quantized:
    _, kept, y = split_equation(used)
    order = [letters.index(letter) for letter in kept]
    summed = tuple(i for i, letter in enumerate(kept) if letter not in y)
    return Quantized(*jax.lax.map(lambda w: _round_outputs(w.transpose(order), summed), w))


def _round_outputs(w: Array, summed: tuple[int, ...]) -> tuple[Array, Array]:
    """int8 values, and fp32 scales over the dimensions that are not `summed`."""
    w = w.astype(jnp.float32)
    scale = _scale_of(jnp.abs(w).max(axis=summed, keepdims=True), 127)
    return jnp.round(w / scale).astype(jnp.int8), scale.squeeze(summed)


def _scale_of(largest: Array, steps: int) -> Array:
    """largest / steps; 1 if all values are 0."""
    return jnp.where(largest == 0, 1, largest / steps)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _to_int4(w: Array, letters: str, dims: Dimensions, groups: Groups) -> Quantized:
    order = [letters.index(letter) for letter in dims.into + dims.out]
    first, out_axes = dims.into[0], tuple(WEIGHT_AXES[letter] for letter in dims.out)
    into_axes = tuple(ACTIVATION_AXES[letter] for letter in dims.into)
    own = groups._replace(parts=groups.parts // parts(_axis_of(ACTIVATION_AXES, first)))
    round_own = functools.partial(_round_groups, groups=own, inputs=len(dims.into))
    # Gathered along the model dimension, which groups may cross, and sharded again if that leaves whole groups.
    is_cut = groups.parts * groups.each % parts(_axis_of(WEIGHT_AXES, first)) == 0
    group_axes = (WEIGHT_AXES[first] if is_cut else ACTIVATION_AXES[first], *out_axes)

    def quantize(w: Array) -> tuple[Array, Array]:
        w = reshard(w.transpose(order), *into_axes, *out_axes)
        if named_sharding() is None:
            return round_own(w)
        rounded = spec(into_axes[0], *out_axes, None), spec(into_axes[0], *out_axes)
        q, scale = jax.shard_map(round_own, in_specs=spec(*into_axes, *out_axes), out_specs=rounded)(w)
        return reshard(q, *group_axes, None), reshard(scale, *group_axes)

    q, scale = jax.lax.map(quantize, w)
    return Quantized(q, scale, groups)


def _round_groups(w: Array, groups: Groups, inputs: int) -> tuple[Array, Array]:
    """int4 [G, outputs..., K] and fp32 [G, outputs...] from one device's [inputs..., outputs...].

    -8 stands for the value of a group furthest from zero, whatever its sign, so scales may be negative: steps are an
    eighth smaller than with 7 for the largest, and 8 is clipped to 7. Smaller scales with smaller squared errors gained
    nothing (docs/quantization.md).
    """
    outputs = w.shape[inputs:]
    w = w.astype(jnp.float32).reshape(groups.parts, -1, *outputs)
    filled = groups.each * groups.size - w.shape[1]
    w = jnp.pad(w, ((0, 0), (0, filled), *[(0, 0)] * len(outputs))).reshape(-1, groups.size, *outputs)
    high, low = w.max(axis=1), w.min(axis=1)
    scale = _scale_of(jnp.where(high > -low, high, low), -8)
    q = jnp.clip(jnp.round(w / scale[:, None]), -8, 7)
    return jnp.moveaxis(q, 1, -1).astype(jnp.int4), scale
