"""Making an empty KV cache."""

from __future__ import annotations

import jax.numpy as jnp

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.kernels.attention import Tokens
from bc2_jax.model.attention import CACHE_AXES, KVCache
from bc2_jax.sharding import reshard


def init_cache(config: ModelConfig, compute: ComputeConfig, batch: int, length: int) -> KVCache:
    """An empty cache of `length` slots for `batch` sequences, cut by batch and heads on the mesh in use.

    Keys and values take 4 * L * B * S * D bytes in bf16: 2 GiB a sequence of 4096 tokens for 7B, 3.1 GiB for 13B.
    """
    shape = (config.num_hidden_layers, batch, config.num_attention_heads, length, config.head_dim)
    k, v = (reshard(jnp.zeros(shape, compute.dtype), *CACHE_AXES) for _ in "kv")
    slots = (reshard(jnp.zeros((batch, length), jnp.int32), "batch", None) for _ in Tokens._fields)
    return KVCache(k, v, Tokens(*slots), jnp.zeros(batch, jnp.int32))
