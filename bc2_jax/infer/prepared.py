"""A model's parameters laid out for decoding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax import Array

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer.cache import CacheDType
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.model.head import Head, normalize_rows
from bc2_jax.model.layers import Embedding, Linear, Weight, split_equation
from bc2_jax.model.lora import LoraLinear
from bc2_jax.sharding import reshard, use_mesh_of


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["graphdef", "config", "compute", "kv"]
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model laid out for decoding; a pytree of its parameters."""

    graphdef: Any
    config: ModelConfig
    compute: ComputeConfig
    params: Params
    kv: CacheDType = "compute"
    """Of the keys and values that its programs keep."""

    def merge(self) -> Baichuan2:
        """The model, whose logits are those of the one that was prepared."""
        return nnx.merge(self.graphdef, self.params)


def prepare(model: Baichuan2, donate: bool = False, whole: bool = False, kv: CacheDType = "compute") -> Prepared:
    """`model` as decoding reads it, so that nothing is done again for every token.

    Weights are in the compute dtype, but for those of the norms, which scale in fp32; the rows of the head are
    normalised. Embedding and head are whole along the model dimension: every step reads all of the head. Weights that
    multiply the hidden states have the model dimension behind, q, k and v as [L, N, D, H], gate and up as [L, F, D]: in
    their stored order the TPU compiler copies them before the first step of each call, gate and up where a chip's part
    of F does not fill its tiles, q, k and v for a single sequence.

    With `whole` the weights of the layers are whole along the model dimension too: gathered here once instead of at
    every step. Each device then holds all of them in the compute dtype, over mesh.tensor. For long decoding on a mesh
    that cuts parameters, where there is room.

    `kv` "int8" keeps keys and values in half the memory, each head of a token with its own scale.

    The given model stays as it is, and what need not change is shared with it. With `donate` it is used up: its arrays
    are deleted one by one as they are replaced, so that beside the prepared parameters never more than one stored
    weight exists.
    """
    graphdef, state = nnx.split(model)
    prepared = nnx.merge(graphdef, state)  # modules of its own around the same arrays
    with use_mesh_of(model.norm.weight[...]):
        modules = [module for _, module in nnx.iter_modules(prepared) if isinstance(module, Weight)]
        for module in modules:
            if isinstance(module, LoraLinear):
                module.fix_row_scale()  # of the weights as they are stored
        for module in modules:
            stored = module.weight[...]
            _lay_out(module, model.compute.dtype, whole)
            if donate and module.weight[...] is not stored:
                stored.delete()
    graphdef, state = nnx.split(prepared)
    return Prepared(graphdef, model.config, model.compute, nnx.to_pure_dict(state), kv)


def _lay_out(module: Weight, dtype: str, whole: bool) -> None:
    """What `prepare` does to the weight of one module."""
    stored = module.weight[...]
    if isinstance(module, Embedding | Head):
        normalize = isinstance(module, Head) and module.normalize
        module.weight = nnx.Param(_table(stored, dtype, normalize), axes=("vocab", None))
        if isinstance(module, Head):
            module.normalize = False  # its rows are
    elif isinstance(module, Linear):
        if stored.dtype != dtype:
            module.weight = nnx.Param(_cast(stored, dtype), axes=module.stacked_axes)
        if "D" in split_equation(module.equation)[0]:
            module.move_model_axis_behind()
        if whole:
            axes = tuple(None if axis == "embed" else axis for axis in module.stacked_axes)
            module.weight = nnx.Param(reshard(module.weight[...], *axes), axes=axes)


@functools.partial(jax.jit, static_argnums=1)
def _cast(w: Array, dtype: str) -> Array:
    return w.astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _table(w_VD: Array, dtype: str, normalize: bool) -> Array:
    rows_VD = normalize_rows(w_VD) if normalize else w_VD
    return reshard(rows_VD.astype(dtype), "vocab", None)
