"""Multi-head self-attention of a decoder layer: projections, positions, attention kernel on the mesh, KV cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.kernels.attention import Tokens, chunked_attention, reference_attention
from bc2_jax.kernels.cached import KVCache, Place, cached_attention
from bc2_jax.kernels.cudnn import cudnn_attention
from bc2_jax.model.layers import EQUATIONS, Linear
from bc2_jax.model.position import alibi_slopes, apply_rope
from bc2_jax.sharding import named_sharding, platform, reshard, spec

CACHE_AXES = ("layers", "batch", "attention_heads", None, "head_dim")
"""Logical axes of keys, values and their scales."""


class SelfAttention(nnx.Module):
    """Holds the stacked weights of all L layers; a call uses the slice of one layer."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        L, D, N, H = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim
        std = config.initializer_range
        # Separate, not fused as in the released W_pack: the fused layout costs large relayout copies on TPU.
        self.q_proj = Linear.random(EQUATIONS["q_proj"], (L, D, N, H), std, rngs=rngs)
        self.k_proj = Linear.random(EQUATIONS["k_proj"], (L, D, N, H), std, rngs=rngs)
        self.v_proj = Linear.random(EQUATIONS["v_proj"], (L, D, N, H), std, rngs=rngs)
        self.o_proj = Linear.random(EQUATIONS["o_proj"], (L, N, H, D), std, rngs=rngs)
        self.config, self.compute = config, compute

    def __call__(self, x_BTD: Array, tokens: Tokens, rope: tuple[Array, Array] | None) -> Array:
        """[B, T, D] -> [B, T, D] of whole sequences."""
        inside = rope is not None and self._rotates_inside(x_BTD.shape[1])
        q, k, v = self._project(x_BTD, None if inside else rope)
        tokens = Tokens(*(reshard(x, "batch", None) for x in tokens))
        with jax.named_scope("attention"):
            out = self._attend(q, k, v, tokens, rope if inside else None)
        return self._merge_heads(out)

    def extend(
        self, x_RTD: Array, place: Place, rope: tuple[Array, Array] | None, slopes_RN: Array | None, cache: KVCache,
        layer: Array | int,
    ) -> tuple[Array, KVCache]:  # fmt: skip
        """[R, T, D] -> [R, T, D] of new tokens; their keys and values are added to one layer of the cache."""
        q, k, v = self._project(x_RTD, rope)
        with jax.named_scope("attention"):
            out, cache = self._append_and_attend(q, k, v, place, slopes_RN, cache, layer)
        return self._merge_heads(out), cache

    def _project(self, x_BTD: Array, rope: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = (reshard(x, "batch", None, "attention_heads", "head_dim") for x in (q, k, v))
        return q, k, v

    def _merge_heads(self, out: Array) -> Array:
        out = reshard(out, "batch", "sequence", "heads", "head_dim")
        return checkpoint_name(self.o_proj(out), "o")

    def _rotates_inside(self, length: int) -> bool:
        """Whether the kernel applies RoPE itself."""
        if self.compute.attention != "flash" or platform() == "gpu":
            return False
        from bc2_jax.kernels.flash import rotates  # Pallas takes most of a second to import

        return rotates(length, self.config.head_dim)

    def _attend(self, q: Array, k: Array, v: Array, tokens: Tokens, rope: tuple[Array, Array] | None = None) -> Array:
        """The kernel on each device's heads of whole sequences; slopes are sharded like the heads. `rope` if q and k
        are not rotated yet."""

        def kernel(q, k, v, tokens, slopes, rope):
            if self.compute.attention == "flash" and platform() == "tpu":
                # The layout that the kernel reads. Outside of shard_map the compiler would gather q, k and v for this.
                q, k, v = (with_layout_constraint(x, Layout(major_to_minor=(0, 2, 1, 3))) for x in (q, k, v))
            # Named after their exchange, so that the backward pass does not repeat it.
            q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
            if self.compute.attention == "flash" and platform() == "gpu":
                return cudnn_attention(q, k, v, tokens, slopes)
            if self.compute.attention == "flash":
                from bc2_jax.kernels.flash import flash_attention  # Pallas takes most of a second to import

                return flash_attention(q, k, v, tokens, slopes, rope=rope)
            if self.compute.attention == "reference":
                return reference_attention(q, k, v, tokens, slopes)
            return chunked_attention(q, k, v, tokens, slopes, block=self.compute.attention_block)

        if rope is not None:
            rope = (reshard(rope[0], "batch", None, None, None), reshard(rope[1], "batch", None, None, None))
        arguments = (q, k, v, tokens, self._slopes(), rope)
        if named_sharding() is None:
            return kernel(*arguments)
        heads = spec("batch", None, "attention_heads", "head_dim")
        rows = spec("batch", None)
        in_specs = (heads, heads, heads, rows, spec("attention_heads"), rows)
        return jax.shard_map(kernel, in_specs=in_specs, out_specs=heads)(*arguments)

    def _append_and_attend(
        self, q: Array, k: Array, v: Array, place: Place, slopes_RN: Array | None, cache: KVCache, layer: Array | int
    ) -> tuple[Array, KVCache]:
        """Writes new tokens [R, T, N, H] to one layer of the cache and attends to it.

        The kernels get the whole cache and the layer's index: slicing would copy.
        """
        is_flash = self.compute.attention == "flash" and q.shape[1] == 1 and platform() != "gpu"

        def kernel(q, k, v, cache, layer, place, slopes, rows):
            # Rows are numbered within each part of the batch.
            place = place._replace(rows=place.rows - rows[0])
            if is_flash:
                from bc2_jax.kernels.flash_decode import flash_decode  # Pallas takes most of a second to import

                out, cache = flash_decode(q[:, 0], k[:, 0], v[:, 0], cache, layer, place.start, slopes)
                return out[:, None], cache
            return cached_attention(q, k, v, cache, layer, place, slopes)

        rows = reshard(jnp.arange(cache.k.shape[1]), "batch")
        place = Place(*(reshard(x, "batch") for x in place))
        arguments = (q, k, v, cache, jnp.asarray(layer, jnp.int32), place, slopes_RN, rows)
        if named_sharding() is None:
            return kernel(*arguments)
        heads, row = spec("batch", None, "attention_heads", "head_dim"), spec("batch")
        slots = jax.tree.map(lambda _: spec(*CACHE_AXES), cache)
        slopes = None if slopes_RN is None else spec("batch", "attention_heads")
        in_specs = (heads, heads, heads, slots, spec(), jax.tree.map(lambda _: row, place), slopes, row)
        return jax.shard_map(kernel, in_specs=in_specs, out_specs=(heads, slots))(*arguments)

    def _slopes(self) -> Array | None:
        """ALiBi slopes, sharded like the heads; None with RoPE."""
        if self.config.position_embedding != "alibi":
            return None
        return reshard(jnp.asarray(alibi_slopes(self.config.num_attention_heads)), "attention_heads")
