"""The model on new tokens of sequences whose earlier ones are in a cache, against PyTorch and on a mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer.decoding import init_cache
from bc2_jax.kernels import flash
from bc2_jax.kernels.blocks import BlockSizes
from bc2_jax.kernels.cached import KVCache, Place
from bc2_jax.model.baichuan import Baichuan2, param_shardings, split_model
from bc2_jax.sharding import DEFAULT_RULES

COMPUTE = ComputeConfig(dtype="float32", attention_block=8)


@functools.cache
def runner(config):
    """jitted (params, ids [R, T], rows, start, cache) -> logits and cache."""
    graphdef, _, _ = split_model(config, COMPUTE)

    def run(params, ids, rows, start, cache):
        model = nnx.merge(graphdef, params)
        h, cache = model.extend(ids, Place(rows, start), cache)
        return model.lm_head(h), cache

    return jax.jit(run)


def extend(golden, ids, start, cache: KVCache, params=None) -> tuple[np.ndarray, KVCache]:
    """The next tokens of every row."""
    start = np.asarray(start, np.int32)
    rows = np.arange(len(start), dtype=np.int32)
    given = golden.params if params is None else params
    logits, cache = runner(golden.config)(given, np.asarray(ids, np.int32), rows, start, cache)
    return np.asarray(logits), cache


def test_decoding_is_greedy_in_pytorch(golden):
    """11 prompt tokens at once, then one by one."""
    prompt, expected = golden.arrays["prompt_ids"], golden.arrays["greedy_ids"]
    (B, T), cache = prompt.shape, init_cache(golden.config, COMPUTE, 2, 128, "compute")
    logits, cache = extend(golden, prompt, [0] * B, cache)
    ids = []
    for step in range(expected.shape[1]):
        ids.append(logits[:, -1].argmax(-1))
        logits, cache = extend(golden, ids[-1][:, None], [T + step] * B, cache)
    np.testing.assert_array_equal(np.stack(ids, 1), expected)


def test_rows_of_different_lengths_are_as_in_pytorch(golden):
    """11 tokens of each, then one by one; a row that has ended is idle while the other continues."""
    mask = golden.arrays["left_pad_attention_mask"] == 1
    rows = [row[real] for row, real in zip(golden.arrays["left_pad_input_ids"], mask, strict=True)]
    expected = [row[real] for row, real in zip(golden.arrays["left_pad_logits"], mask, strict=True)]
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) == 2
    cache = init_cache(golden.config, COMPUTE, 2, 128, "compute")
    logits, cache = extend(golden, [row[:11] for row in rows], [0, 0], cache)
    found = [[*row] for row in logits]
    for t in range(11, max(lengths)):
        start = [t if t < length else -1 for length in lengths]
        logits, cache = extend(golden, [[row[min(t, len(row) - 1)]] for row in rows], start, cache)
        for b, first in enumerate(start):
            found[b] += [logits[b, 0]] if first >= 0 else []
    for row, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.stack(row), wanted, atol=2e-5)


def test_on_a_mesh(golden, mesh_of):
    """Rows and heads of the cache are cut as those of the model."""
    mesh, prompt = mesh_of(2, 1, 2), golden.arrays["prompt_ids"]
    params = jax.device_put(golden.params, param_shardings(golden.config, mesh))
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: init_cache(golden.config, COMPUTE, 2, 128, "compute"))()
        logits, cache = extend(golden, prompt, [0, 0], cache, params)
        for step in range(3):
            token = logits[:, -1].argmax(-1)
            np.testing.assert_array_equal(token, golden.arrays["greedy_ids"][:, step])
            logits, cache = extend(golden, token[:, None], [prompt.shape[1] + step] * 2, cache, params)
    assert cache.k.sharding.spec == DEFAULT_RULES.spec(None, "batch", "attention_heads", None, None)
    assert jnp.isfinite(cache.k).all()


@pytest.mark.parametrize("length", [40, 24])
def test_the_kernel_rotates_what_the_model_does_not(length: int, monkeypatch):
    """RoPE is applied exactly once, in the kernel or before it, with the positions of packed documents."""
    config = ModelConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, position_embedding="rope",
        vocab_size=64, model_max_length=64,
    )  # fmt: skip
    given = []

    def interpreted(*arguments, rope):
        given.append(rope is not None)
        return kernel(*arguments, rope=rope, blocks=BlockSizes(16, 8, 16, 16, 8, span=64, vmem_mib=16), interpret=True)

    kernel = flash.flash_attention
    monkeypatch.setattr(flash, "flash_attention", interpreted)
    monkeypatch.setattr(flash, "ROTATED_LENGTH", 32)
    ids = np.random.default_rng(0).integers(3, 64, (2, length))
    segments = 1 + (np.arange(length) > 9).astype(np.int32)[None].repeat(2, 0)
    logits = {}
    for attention in ("reference", "flash"):
        compute = ComputeConfig(dtype="float32", attention=attention, remat="none")
        model = Baichuan2(config, compute, rngs=nnx.Rngs(0))
        logits[attention] = model(jnp.asarray(ids, jnp.int32), segment_ids=jnp.asarray(segments))
    assert set(given) == {length <= 32}
    np.testing.assert_allclose(logits["flash"], logits["reference"], atol=2e-5)
