"""A model's parameters laid out for decoding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer.cache import CacheDType
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.model.layout import lay_out
from bc2_jax.model.quantized import Scheme


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


def prepare(
    model: Baichuan2, donate: bool = False, whole: bool = False, kv: CacheDType = "compute",
    quantize: Scheme | None = None,
) -> Prepared:  # fmt: skip
    """`model` as decoding reads it: its weights as `model.layout.lay_out` lays them out.

    With `donate` the model is used up; with `whole` the weights of the layers are gathered once instead of at every
    step; `quantize` "int8" or "int4" keeps the weights of layers and head in fewer bits. `kv` "int8" keeps keys and
    values in half the memory, each head of a token with its own scale. Raises ValueError as `lay_out`.
    """
    graphdef, state = nnx.split(lay_out(model, donate, whole, quantize))
    return Prepared(graphdef, model.config, model.compute, nnx.to_pure_dict(state), kv)
