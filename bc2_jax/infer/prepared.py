"""A model's parameters laid out for decoding, and the context length they reach."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer.decoding import CacheDType
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.model.layout import lay_out
from bc2_jax.model.position import LongContext, stretch_of
from bc2_jax.model.quantized import Scheme
from bc2_jax.validation import require


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["graphdef", "config", "compute", "kv", "long_context"],
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model laid out for decoding; a pytree of its parameters."""

    graphdef: Any
    config: ModelConfig
    compute: ComputeConfig
    params: Params
    kv: CacheDType = "compute"
    """How the programs store keys and values."""
    long_context: LongContext | None = None
    """None: sequences have at most the trained length."""

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.config.model_max_length if self.long_context is None else self.long_context.max_length

    @property
    def method(self) -> str:
        """Long-context method; "ntk" without a long context."""
        return "ntk" if self.long_context is None else self.long_context.method

    def stretch(self, tokens: int) -> float:
        """Position stretch of a sequence that may grow to `tokens` tokens."""
        return 1.0 if self.long_context is None else stretch_of(tokens, self.config.model_max_length)

    def reach(self, method: Literal["ntk", "yarn"], max_length: int) -> Prepared:
        """The same model for sequences of up to `max_length` tokens, longer than the trained length.

        Raises ValueError as `check_long_context`.
        """
        return dataclasses.replace(self, long_context=check_long_context(self.config, method, max_length))

    def merge(self) -> Baichuan2:
        """The model; its logits equal those of the model that was prepared."""
        return nnx.merge(self.graphdef, self.params)


def check_long_context(config: ModelConfig, method: Any, max_length: Any) -> LongContext:
    """Raises ValueError for a method that the model does not have, or a length not above the trained one."""
    is_rope = config.position_embedding == "rope"
    legal = 'it must be "ntk" or "yarn"' if is_rope else 'it must be "ntk": the model has ALiBi'
    require(method == "ntk" or (method == "yarn" and is_rope), "long_context", method, legal)
    trained = config.model_max_length
    legal = f"it must be a whole number greater than model_max_length = {trained}"
    require(isinstance(max_length, int) and max_length > trained, "max_length", max_length, legal)
    return LongContext(method, max_length)


def find_long_context(config: ModelConfig, method: str | None, max_length: int | None) -> LongContext | None:
    """The long context of the options --long-context and --max-length; None if neither was given.

    Raises ValueError for one without the other, and as `check_long_context`.
    """
    if (method is None) != (max_length is None):
        raise ValueError("--long-context and --max-length go together: give both or neither.")
    return None if method is None else check_long_context(config, method, max_length)


def prepare(
    model: Baichuan2, donate: bool = False, whole: bool = False, kv: CacheDType = "compute",
    quantize: Scheme | None = None,
) -> Prepared:  # fmt: skip
    """Lays out a model's weights for decoding (`model.layout.lay_out`).

    `donate` uses up the model. `whole` gathers the layers' weights once instead of at every step. `quantize` "int8" or
    "int4" stores the weights of layers and head in fewer bits. `kv` "int8" halves the memory of keys and values, with
    one scale per token and head. Raises ValueError as `lay_out`.
    """
    graphdef, state = nnx.split(lay_out(model, donate, whole, quantize))
    return Prepared(graphdef, model.config, model.compute, nnx.to_pure_dict(state), kv)
