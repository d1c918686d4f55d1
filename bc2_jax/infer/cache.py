"""Making an empty KV cache."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.kernels.cached import BLOCK, LANES, KVCache
from bc2_jax.model.attention import CACHE_AXES
from bc2_jax.sharding import platform, reshard

CacheDType = Literal["compute", "int8"]
"""Of keys and values: the compute dtype, or int8 with a scale for each token and head."""


def init_cache(config: ModelConfig, compute: ComputeConfig, rows: int, slots: int, kv: CacheDType) -> KVCache:
    """An empty cache for `rows` sequences of `slots` tokens, cut by batch and heads on the mesh in use.

    Keys and values take 4 * L * D bytes a token in bf16: 2 GiB a sequence of 4096 tokens for 7B, 3.1 GiB for 13B; as
    int8 with their scales half of it and 3 %. On a CPU, where bf16 matmuls are slow, they are fp32.
    """
    assert slots % BLOCK == 0, slots
    shape = (config.num_hidden_layers, rows, config.num_attention_heads, slots, config.head_dim)
    if kv == "int8":
        k, v = (reshard(jnp.zeros(shape, jnp.int8), *CACHE_AXES) for _ in "kv")
        k_scale, v_scale = (
            reshard(jnp.zeros((*shape[:3], slots // LANES, LANES), jnp.float32), *CACHE_AXES) for _ in "kv"
        )
        return KVCache(k, v, k_scale, v_scale)
    dtype = "float32" if platform() == "cpu" else compute.dtype
    k, v = (reshard(jnp.zeros(shape, dtype), *CACHE_AXES) for _ in "kv")
    return KVCache(k, v, None, None)
