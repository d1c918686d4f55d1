"""A model's weights laid out for decoding, also in 8 or 4 bits, so that no step repeats that work."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
from flax import nnx
from jax import Array

from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.model.equations import move_model_axis_behind, split_equation
from bc2_jax.model.head import Head, normalize_rows
from bc2_jax.model.layers import Embedding, Linear, Weight
from bc2_jax.model.lora import LoraLinear
from bc2_jax.model.quantized import Quantized, Scheme, quantize_linear, quantize_rows
from bc2_jax.sharding import reshard, use_mesh_of
from bc2_jax.validation import require


def lay_out(model: Baichuan2, donate: bool = False, whole: bool = False, quantize: Scheme | None = None) -> Baichuan2:
    """A model with the same logits (nearly, with `quantize`) whose weights are stored as decoding reads them.

    Weights are in the compute dtype, except those of norms, which scale in fp32; the head's rows are normalised.
    Embedding and head are gathered along the model dimension: every step reads all of the head. Weights that multiply
    hidden states have the model dimension second, q, k and v as [L, N, D, H], gate and up as [L, F, D]: in their stored
    order the TPU compiler copies them before the first step of each call (gate and up if a chip's shard of F does not
    fill its tiles; q, k and v for a single sequence).

    `whole` also gathers the weights of the layers along the model dimension, once instead of in every step: each device
    holds them all in the compute dtype, sharded over mesh.tensor only. For long decoding on a mesh that shards
    parameters, if memory allows.

    `quantize` stores the weights of the layers as int8 or int4 and the head's rows as int8 (`model/quantized.py`); an
    adapter beside them is unchanged. A model that is already quantized, as from `load_pretrained`, is not rounded
    again.

    The given model does not change; unchanged arrays are shared. `donate` deletes its arrays one by one as they are
    replaced, so that at most one stored weight exists beside the new parameters.

    Raises ValueError if the model is already quantized in another way than `quantize`.
    """
    schemes = get_args(Scheme)
    require(quantize in (None, *schemes), "quantize", quantize, f"it must be {' or '.join(schemes)}")
    found = scheme_of(model)
    require(
        None in (quantize, found) or quantize == found, "quantize", quantize,
        f"the weights of this model are {found} already",
    )  # fmt: skip
    graphdef, state = nnx.split(model)
    prepared = nnx.merge(graphdef, state)  # modules of its own around the same arrays
    with use_mesh_of(model.norm.weight[...]):
        modules = [module for _, module in nnx.iter_modules(prepared) if isinstance(module, Weight)]
        for module in modules:
            if isinstance(module, LoraLinear) and found is None:
                module.fix_row_scale()  # from the weights as stored
        for module in modules:
            stored = module.weight[...]
            if found is None:
                _lay_out(module, model.compute.dtype, quantize)
            if whole and isinstance(module, Linear):
                _gather(module)
            if donate and found is None and module.weight[...] is not stored:
                stored.delete()
    return prepared


def scheme_of(model: Baichuan2) -> Scheme | None:
    """How the weights of a model are quantized; None if they are not."""
    values: list[Any] = [module.weight[...] for _, module in nnx.iter_modules(model) if isinstance(module, Weight)]
    quantized = [value for value in values if isinstance(value, Quantized)]
    return None if not quantized else "int8" if all(value.groups is None for value in quantized) else "int4"


def _lay_out(module: Weight, dtype: str, quantize: Scheme | None) -> None:
    """`lay_out` for the weight of one module."""
    stored = module.weight[...]
    if isinstance(module, Head):
        value: Any = _table(stored, dtype, module.normalize) if quantize is None else _rows(stored, module.normalize)
        module.weight = nnx.Param(value, axes=("vocab", None))
        module.normalize = False  # already done
    elif isinstance(module, Embedding):
        module.weight = nnx.Param(_table(stored, dtype, False), axes=("vocab", None))
    elif isinstance(module, Linear):
        x, w, _ = split_equation(module.equation)
        if quantize is not None and "R" not in w:  # adapters (R) are small and stay exact
            used = move_model_axis_behind(module.equation) if "D" in x else module.equation
            value = quantize_linear(stored, module.equation, used, quantize)
            module.weight, module.equation = nnx.Param(value), used
            return
        if stored.dtype != dtype:
            module.weight = nnx.Param(_cast(stored, dtype), axes=module.stacked_axes)
        if "D" in x:
            module.move_model_axis_behind()


def _gather(module: Linear) -> None:
    """Gathers a weight along the model dimension."""
    weight: Any = module.weight[...]
    if isinstance(weight, Quantized):
        module.weight = nnx.Param(weight.whole(module.equation))  # type: ignore[arg-type]  # a pytree of arrays
        return
    axes = tuple(None if axis == "embed" else axis for axis in module.stacked_axes)
    module.weight = nnx.Param(reshard(weight, *axes), axes=axes)


@functools.partial(jax.jit, static_argnums=1)
def _cast(w: Array, dtype: str) -> Array:
    return w.astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _table(w_VD: Array, dtype: str, normalize: bool) -> Array:
    rows_VD = normalize_rows(w_VD) if normalize else w_VD
    return reshard(rows_VD.astype(dtype), "vocab", None)


@functools.partial(jax.jit, static_argnums=1)
def _rows(w_VD: Array, normalize: bool) -> Quantized:
    # Gathered before they are normalised: sums over a sharded dimension would depend on the mesh.
    return quantize_rows(_table(reshard(w_VD, "vocab", None), "float32", normalize))
