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
from bc2_jax.kernels.attention import Tokens, chunked_attention, reference_attention
from bc2_jax.model.layers import Linear
from bc2_jax.model.position import alibi_slopes, apply_rope
from bc2_jax.sharding import named_sharding, reshard, spec


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots that all sequences of the batch share."""

    k: Array
    """[L, B, N, S, H] in the compute dtype: slots and head size last, so that a TPU's tiles hold no padding."""
    v: Array
    tokens: Tokens
    """Position and segment of each slot, int32 [B, S]; segment 0 is an empty slot or padding."""
    length: Array
    """Slots in use, int32 scalar."""


class SelfAttention(nnx.Module):
    """Weights of all L layers are stacked; a call uses one layer's slice."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        L, D, N, H = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim
        std = config.initializer_range
        # Apart rather than fused as the released W_pack: a fused layout costs large relayout copies on TPU.
        self.q_proj = Linear("BTD,DNH->BTNH", (L, D, N, H), std, rngs=rngs)
        self.k_proj = Linear("BTD,DNH->BTNH", (L, D, N, H), std, rngs=rngs)
        self.v_proj = Linear("BTD,DNH->BTNH", (L, D, N, H), std, rngs=rngs)
        self.o_proj = Linear("BTNH,NHD->BTD", (L, N, H, D), std, rngs=rngs)
        self.config, self.compute = config, compute

    def __call__(
        self, x_BTD: Array, tokens: Tokens, rope: tuple[Array, Array] | None, cache: KVCache | None, layer: Array | int
    ) -> tuple[Array, KVCache | None]:
        """[B, T, D] -> [B, T, D]. With a cache, writes the new keys and values at its end and returns it."""
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        q, k, v = (reshard(x, "batch", None, "attention_heads", "head_dim") for x in (q, k, v))
        if cache is not None:
            start = (layer, 0, 0, cache.length, 0)
            cache = cache._replace(
                k=jax.lax.dynamic_update_slice(cache.k, jnp.swapaxes(k, 1, 2)[None], start),
                v=jax.lax.dynamic_update_slice(cache.v, jnp.swapaxes(v, 1, 2)[None], start),
            )
        if cache is not None and q.shape[1] == 1:
            out = self._attend_to_cache(q, tokens, cache, layer)
        else:
            # A prefill fills an empty cache, so its tokens see only each other.
            out = self._attend(q, k, v, tokens, tokens, 0)
        out = reshard(out, "batch", "sequence", "heads", "head_dim")
        return checkpoint_name(self.o_proj(out), "o"), cache

    def _attend(self, q: Array, k: Array, v: Array, q_tokens: Tokens, k_tokens: Tokens, offset: Array | int) -> Array:
        """The kernel, on each device's own heads of whole sequences; slopes are cut with their heads."""
        slopes = self._slopes()

        def self_attention(q, k, v, q_tokens, k_tokens, slopes, offset):
            if self.compute.attention == "flash":
                from bc2_jax.kernels.flash import flash_attention  # Pallas takes most of a second to import

                return flash_attention(q, k, v, q_tokens, slopes)
            return chunked_attention(q, k, v, q_tokens, slopes, block=self.compute.attention_block)

        in_blocks = self.compute.attention != "reference" and q.shape[1] == k.shape[1]
        kernel: Callable[..., Array] = self_attention if in_blocks else reference_attention
        with jax.named_scope("attention"):
            q_tokens, k_tokens = (
                Tokens(*(reshard(x, "batch", None) for x in tokens)) for tokens in (q_tokens, k_tokens)
            )
            arguments = (q, k, v, q_tokens, k_tokens, slopes, jnp.asarray(offset, jnp.int32))
            if named_sharding() is None:
                return kernel(*arguments)
            heads, rows = spec("batch", None, "attention_heads", "head_dim"), (spec("batch", None),) * 2
            slopes_spec = None if slopes is None else spec("attention_heads")
            in_specs = (heads, heads, heads, Tokens._make(rows), Tokens._make(rows), slopes_spec, spec())
            return jax.shard_map(kernel, in_specs=in_specs, out_specs=heads)(*arguments)

    def _attend_to_cache(self, q: Array, tokens: Tokens, cache: KVCache, layer: Array | int) -> Array:
        """Attention of one token a sequence, [B, 1, N, H], which is already in the cache, to one layer of it."""
        if self.compute.attention != "flash":
            k, v = (jnp.swapaxes(x[layer], 1, 2) for x in (cache.k, cache.v))
            return self._attend(q, k, v, tokens, cache.tokens, cache.length)
        from bc2_jax.kernels.flash_decode import flash_decode  # Pallas takes most of a second to import

        with jax.named_scope("attention"):
            # The whole cache and the number of the layer: a slice would be copied.
            layer, slopes = jnp.asarray(layer, jnp.int32), self._slopes()
            tokens = Tokens(*(reshard(x, "batch", None) for x in tokens))
            arguments = (q[:, 0], cache.k, cache.v, layer, cache.length, tokens, cache.tokens, slopes)
            if named_sharding() is None:
                return flash_decode(*arguments)[:, None]
            heads, rows = spec("batch", "attention_heads", "head_dim"), Tokens._make((spec("batch", None),) * 2)
            slots = spec("layers", "batch", "attention_heads", None, "head_dim")
            slopes_spec = None if slopes is None else spec("attention_heads")
            in_specs = (heads, slots, slots, spec(), spec(), rows, rows, slopes_spec)
            return jax.shard_map(flash_decode, in_specs=in_specs, out_specs=heads)(*arguments)[:, None]

    def _slopes(self) -> Array | None:
        """ALiBi's slopes, cut as the heads are; None where positions are rotated."""
        if self.config.position_embedding != "alibi":
            return None
        return reshard(jnp.asarray(alibi_slopes(self.config.num_attention_heads)), "attention_heads")
