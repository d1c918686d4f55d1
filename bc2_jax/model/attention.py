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
from bc2_jax.model.layers import Weight, linear
from bc2_jax.model.position import alibi_slopes, apply_rope
from bc2_jax.sharding import ShardingRules


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

    def __init__(self, config: ModelConfig, compute: ComputeConfig, rules: ShardingRules, *, rngs: nnx.Rngs):
        L, D, N, H = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim
        std = config.initializer_range
        # Apart rather than fused as the released W_pack: a fused layout costs large relayout copies on TPU.
        into, out = ("layers", "embed", "heads", "head_dim"), ("layers", "heads", "head_dim", "embed")
        self.q_proj = Weight.normal(rngs, (L, D, N, H), into, std, rules)
        self.k_proj = Weight.normal(rngs, (L, D, N, H), into, std, rules)
        self.v_proj = Weight.normal(rngs, (L, D, N, H), into, std, rules)
        self.o_proj = Weight.normal(rngs, (L, N, H, D), out, std, rules)
        self.transposed = False
        """Whether q_proj, k_proj and v_proj hold [L, N, D, H]."""
        self.config, self.compute, self.rules = config, compute, rules

    def __call__(
        self, x_BTD: Array, tokens: Tokens, rope: tuple[Array, Array] | None, cache: KVCache | None, layer: Array | int
    ) -> tuple[Array, KVCache | None]:
        """[B, T, D] -> [B, T, D]. With a cache, writes the new keys and values at its end and returns it."""
        out_axes = ("batch", "sequence", "heads", "head_dim")
        into, equation = ("embed", "heads", "head_dim"), "BTD,DNH->BTNH"
        if self.transposed:
            into, equation = ("heads", "embed", "head_dim"), "BTD,NDH->BTNH"
        q, k, v = (
            linear(equation, x_BTD, proj.weight[...], into, out_axes, self.rules)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        q, k, v = (self.rules.reshard(x, "batch", None, "attention_heads", "head_dim") for x in (q, k, v))
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
        out = self.rules.reshard(out, *out_axes)
        y_BTD = linear(
            "BTNH,NHD->BTD", out, self.o_proj.weight[...], ("heads", "head_dim", "embed"),
            ("batch", "sequence", "hidden"), self.rules,
        )  # fmt: skip
        return checkpoint_name(y_BTD, "o"), cache

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
                Tokens(*(self.rules.reshard(x, "batch", None) for x in tokens)) for tokens in (q_tokens, k_tokens)
            )
            arguments = (q, k, v, q_tokens, k_tokens, slopes, jnp.asarray(offset, jnp.int32))
            if self.rules.sharding() is None:
                return kernel(*arguments)
            spec = self.rules.spec
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
            tokens = Tokens(*(self.rules.reshard(x, "batch", None) for x in tokens))
            arguments = (q[:, 0], cache.k, cache.v, layer, cache.length, tokens, cache.tokens, slopes)
            if self.rules.sharding() is None:
                return flash_decode(*arguments)[:, None]
            spec = self.rules.spec
            heads, rows = spec("batch", "attention_heads", "head_dim"), Tokens._make((spec("batch", None),) * 2)
            slots = spec("layers", "batch", "attention_heads", None, "head_dim")
            slopes_spec = None if slopes is None else spec("attention_heads")
            in_specs = (heads, slots, slots, spec(), spec(), rows, rows, slopes_spec)
            return jax.shard_map(flash_decode, in_specs=in_specs, out_specs=heads)(*arguments)[:, None]

    def _slopes(self) -> Array | None:
        """ALiBi's slopes, cut as the heads are; None where positions are rotated."""
        if self.config.position_embedding != "alibi":
            return None
        return self.rules.reshard(jnp.asarray(alibi_slopes(self.config.num_attention_heads)), "attention_heads")
