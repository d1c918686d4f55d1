"""Multi-head self-attention of one decoder layer: projections, positions, the kernel on the mesh, the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.kernels.attention import Tokens, chunked_attention, reference_attention, reference_decode
from bc2_jax.model.layers import Linear
from bc2_jax.model.position import alibi_slopes, apply_rope
from bc2_jax.sharding import named_sharding, reshard, spec


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; each row of the batch fills its slots from the first on."""

    k: Array
    """[L, B, N, S, H] in the compute dtype: slots and head size last, so that a TPU's tiles hold no padding."""
    v: Array
    tokens: Tokens
    """Position and segment of each slot, int32 [B, S]; segment 0 is an empty slot or padding."""
    length: Array
    """Slots in use of each row, int32 [B]; its next token goes to the slot of this number."""


CACHE_AXES = ("layers", "batch", "attention_heads", None, "head_dim")
"""The logical axes of keys and values."""


class SelfAttention(nnx.Module):
    """Weights of all L layers are stacked; a call uses one layer's slice."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        L, D, N, H = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim
        std = config.initializer_range
        # Apart rather than fused as the released W_pack: a fused layout costs large relayout copies on TPU.
        self.q_proj = Linear.random("BTD,DNH->BTNH", (L, D, N, H), std, rngs=rngs)
        self.k_proj = Linear.random("BTD,DNH->BTNH", (L, D, N, H), std, rngs=rngs)
        self.v_proj = Linear.random("BTD,DNH->BTNH", (L, D, N, H), std, rngs=rngs)
        self.o_proj = Linear.random("BTNH,NHD->BTD", (L, N, H, D), std, rngs=rngs)
        self.config, self.compute = config, compute

    def __call__(
        self, x_BTD: Array, tokens: Tokens, rope: tuple[Array, Array] | None, cache: KVCache | None, layer: Array | int
    ) -> tuple[Array, KVCache | None]:
        """[B, T, D] -> [B, T, D]. With a cache, also writes the new keys and values to it and returns it.

        T is then the whole prompt of an empty cache, or 1.
        """
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        q, k, v = (reshard(x, "batch", None, "attention_heads", "head_dim") for x in (q, k, v))
        tokens = Tokens(*(reshard(x, "batch", None) for x in tokens))
        with jax.named_scope("attention"):
            if cache is not None and q.shape[1] == 1:
                out, cache = self._append_and_attend(q, k, v, tokens, cache, layer)
            else:
                # A prefill fills an empty cache, so its tokens see only each other.
                out = self._attend(q, k, v, tokens)
                cache = None if cache is None else _fill(cache, k, v, layer)
        out = reshard(out, "batch", "sequence", "heads", "head_dim")
        return checkpoint_name(self.o_proj(out), "o"), cache

    def _attend(self, q: Array, k: Array, v: Array, tokens: Tokens) -> Array:
        """The kernel, on each device's own heads of whole sequences; slopes are cut with their heads."""

        def kernel(q, k, v, tokens, slopes):
            if self.compute.attention == "flash":
                from bc2_jax.kernels.flash import flash_attention  # Pallas takes most of a second to import

                return flash_attention(q, k, v, tokens, slopes)
            if self.compute.attention == "reference":
                return reference_attention(q, k, v, tokens, tokens, slopes)
            return chunked_attention(q, k, v, tokens, slopes, block=self.compute.attention_block)

        arguments = (q, k, v, tokens, self._slopes())
        if named_sharding() is None:
            return kernel(*arguments)
        heads = spec("batch", None, "attention_heads", "head_dim")
        in_specs = (heads, heads, heads, spec("batch", None), spec("attention_heads"))
        return jax.shard_map(kernel, in_specs=in_specs, out_specs=heads)(*arguments)

    def _append_and_attend(
        self, q: Array, k: Array, v: Array, tokens: Tokens, cache: KVCache, layer: Array | int
    ) -> tuple[Array, KVCache]:
        """One token a row, [B, 1, N, H]: its keys and values go to one layer of the cache, which it then attends to.

        The kernel has the whole cache and the number of the layer: a slice of it would be copied.
        """
        kernel: Callable[..., tuple[Array, Array, Array]] = reference_decode
        if self.compute.attention == "flash":
            from bc2_jax.kernels.flash_decode import flash_decode  # Pallas takes most of a second to import

            kernel = flash_decode
        layer, length_B = jnp.asarray(layer, jnp.int32), reshard(cache.length, "batch")
        new = (x[:, 0] for x in (q, k, v))
        arguments = (*new, cache.k, cache.v, layer, length_B, tokens, cache.tokens, self._slopes())
        if named_sharding() is not None:
            heads, slots = spec("batch", "attention_heads", "head_dim"), spec(*CACHE_AXES)
            rows = spec("batch", None)
            in_specs = (heads, heads, heads, slots, slots, spec(), spec("batch"), rows, rows, spec("attention_heads"))
            kernel = jax.shard_map(kernel, in_specs=in_specs, out_specs=(heads, slots, slots))
        out, k, v = kernel(*arguments)
        return out[:, None], cache._replace(k=k, v=v)

    def _slopes(self) -> Array | None:
        """ALiBi's slopes, cut as the heads are; None where positions are rotated."""
        if self.config.position_embedding != "alibi":
            return None
        return reshard(jnp.asarray(alibi_slopes(self.config.num_attention_heads)), "attention_heads")


def _fill(cache: KVCache, k_BTNH: Array, v_BTNH: Array, layer: Array | int) -> KVCache:
    """The cache with one layer's keys and values in its first slots."""
    start = (layer, 0, 0, 0, 0)
    return cache._replace(
        k=jax.lax.dynamic_update_slice(cache.k, jnp.swapaxes(k_BTNH, 1, 2)[None], start),
        v=jax.lax.dynamic_update_slice(cache.v, jnp.swapaxes(v_BTNH, 1, 2)[None], start),
    )
