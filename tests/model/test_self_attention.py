"""Self-attention with its projections and positions, and the cache that decoding fills."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig
from bc2_jax.kernels.attention import Tokens
from bc2_jax.model.attention import KVCache
from bc2_jax.model.baichuan import param_shardings, split_model
from bc2_jax.sharding import DEFAULT_RULES, named_sharding, reshard


def empty_cache(config, B: int, S: int, sharding=None) -> KVCache:
    shape = (config.num_hidden_layers, B, config.num_attention_heads, S, config.head_dim)
    make = lambda shape, dtype, axes: jnp.zeros(shape, dtype, device=sharding and sharding(*axes))  # noqa: E731
    kv = make(shape, jnp.float32, (None, "batch", "attention_heads", None, None))
    slots = make((B, S), jnp.int32, ("batch", None))
    return KVCache(kv, kv, Tokens(slots, slots), jnp.zeros(B, jnp.int32))


@functools.cache
def runner(config, scan_layers: bool):
    compute = ComputeConfig(dtype="float32", attention_block=8, scan_layers=scan_layers)
    graphdef, _, _ = split_model(config, compute)

    def run(params, ids, positions, segments, cache):
        model = nnx.merge(graphdef, params)
        h, cache = model.hidden_states(ids, positions, segments, cache)
        return model.lm_head(h), cache

    return jax.jit(run)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_decoding_with_a_cache_is_greedy_in_pytorch(golden, scan_layers: bool):
    """11 prompt tokens at once, then one by one, in slots that are longer than needed."""
    prompt, expected = golden.arrays["prompt_ids"], golden.arrays["greedy_ids"]
    B, steps = expected.shape
    run, cache = runner(golden.config, scan_layers), empty_cache(golden.config, B, 48)
    logits, cache = run(golden.params, prompt, None, None, cache)
    ids = []
    for step in range(steps):
        ids.append(np.asarray(logits[:, -1].argmax(-1), np.int32))
        positions = np.full((B, 1), prompt.shape[1] + step)
        logits, cache = run(golden.params, ids[-1][:, None], positions, None, cache)
    np.testing.assert_array_equal(np.stack(ids, 1), expected)
    np.testing.assert_array_equal(cache.length, prompt.shape[1] + steps)


def test_left_padded_decoding_equals_the_whole_sequence(golden):
    ids, mask = golden.arrays["left_pad_input_ids"], golden.arrays["left_pad_attention_mask"].astype(np.int32)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    run, cut = runner(golden.config, True), 20
    cache = empty_cache(golden.config, 2, 40)
    logits, cache = run(golden.params, ids[:, :cut], positions[:, :cut], mask[:, :cut], cache)
    rows = [np.asarray(logits)]
    for t in range(cut, ids.shape[1]):
        one = slice(t, t + 1)
        logits, cache = run(golden.params, ids[:, one], positions[:, one], mask[:, one], cache)
        rows.append(np.asarray(logits))
    result = np.concatenate(rows, 1)
    np.testing.assert_allclose(result[mask == 1], golden.arrays["left_pad_logits"][mask == 1], atol=2e-5)


def test_decoding_on_a_mesh(golden, mesh_of):
    """Rows and heads of the cache are cut as those of the model."""
    mesh, prompt = mesh_of(2, 1, 2), golden.arrays["prompt_ids"]
    params = jax.device_put(golden.params, param_shardings(golden.config, mesh))
    with jax.set_mesh(mesh):
        put = lambda x: reshard(jnp.asarray(x, jnp.int32), "batch", None)  # noqa: E731
        cache = empty_cache(golden.config, 2, 32, named_sharding)
        run = runner(golden.config, True)
        logits, cache = run(params, put(prompt), None, None, cache)
        for step in range(3):
            token = np.asarray(logits)[:, -1].argmax(-1)
            np.testing.assert_array_equal(token, golden.arrays["greedy_ids"][:, step])
            positions = np.full((2, 1), prompt.shape[1] + step)
            logits, cache = run(params, put(token[:, None]), put(positions), None, cache)
    assert cache.k.sharding.spec == DEFAULT_RULES.spec(None, "batch", "attention_heads", None, None)
