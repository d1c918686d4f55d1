"""The output embedding and NormHead (paper section 2.4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bc2_jax.config import ModelConfig
from bc2_jax.model.layers import Weight
from bc2_jax.model.quantized import Quantized
from bc2_jax.sharding import named_sharding, reshard

# As in torch.nn.functional.normalize, which the released code uses: shorter rows count as zero.
MIN_NORM = 1e-12


def normalize_rows(w_VD: Array) -> Array:
    """Rows of unit length, computed in at least fp32.

    A zero row, as in an extended vocabulary, gives a zero row and a zero gradient instead of 0 / 0.
    """
    w_VD = w_VD.astype(jnp.promote_types(w_VD.dtype, jnp.float32))
    squares = jnp.sum(w_VD * w_VD, axis=-1, keepdims=True)
    is_zero = squares < MIN_NORM**2
    return w_VD * jnp.where(is_zero, 0.0, jax.lax.rsqrt(jnp.where(is_zero, 1.0, squares)))


class Head(Weight):
    """Output embedding `weight` [V, D], stored without normalisation, as in the released files."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        bound = config.hidden_size**-0.5
        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        out_sharding = named_sharding(*axes)
        value = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound, out_sharding=out_sharding)
        super().__init__(value, axes)
        self.normalize = config.normalize_head

    def rows(self) -> Array:
        """[V, D] factors of the hidden states: the normalised rows of the weight, or the weight itself."""
        weight = self.weight[...]
        if isinstance(weight, Quantized):
            return reshard(weight.q.astype(jnp.float32) * weight.scale[:, None], "vocab", "embed")
        return normalize_rows(weight) if self.normalize else weight

    def __call__(self, h_BTD: Array) -> Array:
        """Logits [B, T, V] in fp32."""
        if isinstance(weight := self.weight[...], Quantized):
            return weight.multiply("BTD,VD->BTV", h_BTD)
        rows = reshard(self.rows().astype(h_BTD.dtype), "vocab", None)
        sharding = named_sharding("batch", "sequence", "vocab")
        return jnp.einsum("BTD,VD->BTV", h_BTD, rows, preferred_element_type=jnp.float32, out_sharding=sharding)
