"""The decoding kernel in interpret mode against the same function in plain JAX and against numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.kernels import flash_decode as module
from bc2_jax.kernels.cached import LANES, KVCache, Place, cached_attention, quantize_tokens
from bc2_jax.kernels.flash_decode import block_length, flash_decode
from bc2_jax.model.position import alibi_slopes
from tests.kernels.test_cached import as_float64, numpy_attention

H, LAYER = 16, 1


def make_inputs(B: int, N: int, S: int, dtype, kv, seed: int = 0):
    """q, k and v of a new token of each row, and a cache of two layers in which every slot holds something."""
    rng = np.random.default_rng(seed)
    new = [jnp.asarray(rng.normal(size=(B, N, H)), dtype) for _ in "qkv"]
    k, v = (jnp.asarray(rng.normal(size=(2, B, N, S, H)), jnp.float32) for _ in "kv")
    if kv == "int8":
        (k, k_scale), (v, v_scale) = quantize_tokens(k), quantize_tokens(v)
        return new, KVCache(k, v, *(x.reshape(*x.shape[:3], -1, LANES) for x in (k_scale, v_scale)))
    return new, KVCache(k.astype(kv), v.astype(kv), None, None)


@functools.cache
def runner(alibi: bool, plain: bool = False, cores: int = 1):
    """jitted (q, k, v, cache, start) -> result and cache."""

    def run(q, k, v, cache, start):
        B, N = q.shape[:2]
        slopes = jnp.broadcast_to(jnp.asarray(alibi_slopes(N)), (B, N)) if alibi else None
        if plain:
            place = Place(jnp.arange(B), start)
            out, cache = cached_attention(*(x[:, None] for x in (q, k, v)), cache, jnp.int32(LAYER), place, slopes)
            return out[:, 0], cache
        return flash_decode(q, k, v, cache, jnp.int32(LAYER), start, slopes, cores=cores, interpret=True)

    return jax.jit(run)


def attend(new, cache: KVCache, start, alibi: bool = True, plain: bool = False, cores: int = 1):
    return jax.tree.map(np.asarray, runner(alibi, plain, cores)(*new, cache, jnp.asarray(start, jnp.int32)))


def compare(start: list[int], N: int, S: int, alibi: bool, kv: str, seed: int = 0, cores: int = 1) -> float:
    """The caches are those of plain JAX bit for bit; returns the largest difference of the results."""
    new, cache = make_inputs(len(start), N, S, jnp.float32, kv, seed)
    out, after = attend(new, cache, start, alibi, cores=cores)
    expected, expected_after = attend(new, cache, start, alibi, plain=True)
    jax.tree.map(np.testing.assert_array_equal, after, expected_after)
    has_token = np.array(start) >= 0
    return float(np.abs(out - expected)[has_token].max(initial=0))


@settings(max_examples=14)
@given(
    used=st.lists(st.floats(-0.2, 0.999), min_size=3, max_size=3), N=st.sampled_from([1, 5]),
    S=st.sampled_from([128, 256]), alibi=st.booleans(), kv=st.sampled_from(["float32", "int8"]),
    seed=st.integers(0, 99), cores=st.sampled_from([1, 2]),
)  # fmt: skip
def test_any_lengths(used: list[float], N: int, S: int, alibi: bool, kv: str, seed: int, cores: int):
    """Some rows idle: a negative share is no token."""
    assert compare([int(share * S) if share >= 0 else -1 for share in used], N, S, alibi, kv, seed, cores) < 2e-6


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ([5, 0, 9], [0, 1, 2]), ([-1, -1, 7, -1, 3, -1], [2, 2, 2, 2, 4, 4]), ([-1, -1], [0, 0]), ([-1], [0]),
        ([4, -1, -1], [0, 0, 0]),
    ],
)  # fmt: skip
def test_rows_without_a_token_have_the_blocks_of_a_neighbour(start: list[int], expected: list[int]):
    assert module._sources(jnp.asarray(start)).tolist() == expected
    new, cache = make_inputs(len(start), 5, 128, jnp.float32, "float32")
    out, after = attend(new, cache, start)
    jax.tree.map(np.testing.assert_array_equal, after, attend(new, cache, start, plain=True)[1])
    assert np.isfinite(out).all()


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_bf16_is_near_the_exact_values(kv: str):
    """Of the cache as it is after the write, in fp64."""
    start = [200, 0, -1, 255, 31]
    new, cache = make_inputs(5, 5, 256, jnp.bfloat16, kv)
    out, after = attend(new, cache, start)
    assert out.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, after, attend(new, cache, start, plain=True)[1])
    k, v = as_float64(after)
    for b, first in enumerate(start):
        if first >= 0:
            exact = numpy_attention(new[0][b][None], k[LAYER, b], v[LAYER, b], first, alibi_slopes(5))[0]
            np.testing.assert_allclose(np.asarray(out[b], np.float64), exact, atol=2e-2)


@pytest.mark.parametrize("start", [[0, 127, 5], [128, -1, 0], [383, 64, 300]])
@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_blocks_behind_the_last_slot_and_idle_rows_are_not_read(start: list[int], kv: str, monkeypatch):
    """Nor is anything written but the slot of the new token."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 128 * 3 * H * 4)
    assert block_length(384, 3 * H * 4) == 128
    new, cache = make_inputs(3, 3, 384, jnp.float32, kv)
    ends = np.where(np.array(start) < 0, 0, (np.array(start) // 128 + 1) * 128)
    behind = jnp.asarray(np.arange(384) >= ends[:, None])[None, :, None]

    def spoil(x):
        if x is None or x.dtype == jnp.int8:  # its scale is spoilt
            return x
        is_scale = x.shape[3] < cache.k.shape[3]
        return jnp.where(behind.reshape(1, 3, 1, -1, LANES) if is_scale else behind[..., None], jnp.nan, x)

    spoilt = KVCache(*map(spoil, cache))
    out, after = attend(new, spoilt, start, alibi=False)
    expected, clean_after = attend(new, cache, start, alibi=False)
    has_token = np.array(start) >= 0
    np.testing.assert_array_equal(out[has_token], expected[has_token])
    for x, before, clean_before, clean in zip(after, spoilt, cache, clean_after, strict=True):
        if x is not None:
            written = clean != np.asarray(clean_before)
            np.testing.assert_array_equal(x, np.where(written, clean, before))
            slots = written.reshape(2, 3, 3, 384, -1).any((0, 2, 4))
            for b, first in enumerate(start):
                assert np.flatnonzero(slots[b]).tolist() == ([first] if first >= 0 else [])


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_a_full_row_keeps_its_slots(kv: str):
    """Its token still attends to all of them and to itself."""
    new, cache = make_inputs(2, 5, 128, jnp.float32, kv)
    out, after = attend(new, cache, [128, 5])
    jax.tree.map(lambda x, before: np.testing.assert_array_equal(x[:, 0], before[:, 0]), after, cache)
    k, v = as_float64(cache)
    own = new[1:]
    if kv == "int8":
        own = [q * scale[..., None] for q, scale in map(quantize_tokens, own)]
    k, v = (np.concatenate([x[LAYER, 0], np.asarray(y[0])[:, None]], 1) for x, y in zip((k, v), own, strict=True))
    np.testing.assert_allclose(out[0], numpy_attention(new[0][0][None], k, v, 128, alibi_slopes(5))[0], atol=2e-6)


def test_scale_rows():
    assert module.scale_rows(8, 32) == (8, 8) and module.scale_rows(16, 16) == (16, 8)
    # Blocks that the hardware doesn't take alone: several of them, or all.
    assert module.scale_rows(3, 48) == (24, 8) and module.scale_rows(2, 18) == (18, 18)
    assert module.scale_rows(1, 1) == (1, 1)


def test_block_length():
    slot = 5 * 128 * 2  # 13B on 8 chips
    assert block_length(4096, slot) == 1024
    assert block_length(4096, 2 * slot) == 512
    assert block_length(2304, slot) == 1152
    # No block is small enough: the smallest that the hardware takes.
    assert block_length(256, 2**20) == 128
