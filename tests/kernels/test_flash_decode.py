"""The decoding kernel in interpret mode against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.kernels import flash_decode as module
from bc2_jax.kernels.attention import Tokens, reference_decode
from bc2_jax.kernels.flash_decode import block_length, flash_decode
from bc2_jax.model.position import alibi_slopes


def make_inputs(lengths: list[int], N: int, S: int, dtype, seed: int = 0):
    """Row b has lengths[b] slots in use, the first third of them padding; the last row is padding throughout."""
    rng = np.random.default_rng(seed)
    L, H, B = 2, 16, len(lengths)
    q, k_new, v_new = (jnp.asarray(rng.normal(size=(B, N, H)), dtype) for _ in "qkv")
    k, v = (jnp.asarray(rng.normal(size=(L, B, N, S, H)), dtype) for _ in "kv")
    length, slot = np.asarray(lengths, np.int32), np.arange(S)
    start = length[:, None] // 3
    segments = ((slot >= start) & (slot <= length[:, None])).astype(np.int32)
    segments[-1] = 0
    slots = Tokens(jnp.asarray(np.maximum(slot - start, 0), jnp.int32), jnp.asarray(segments))
    own = Tokens(jnp.asarray(length[:, None] - start, jnp.int32), jnp.asarray([[1]] * (B - 1) + [[0]], jnp.int32))
    return (q, k_new, v_new, k, v, jnp.int32(1), jnp.asarray(length), own, slots)


def compare(lengths: list[int], N: int, S: int, alibi: bool, dtype, seed: int = 0) -> float:
    """The caches are those of the reference bit for bit; returns the largest difference of the results."""
    inputs = make_inputs(lengths, N, S, dtype, seed)
    slopes = jnp.asarray(alibi_slopes(N)) if alibi else None
    out, *caches = jax.jit(lambda *inputs: flash_decode(*inputs, slopes, interpret=True))(*inputs)
    reference = jax.jit(lambda *inputs: reference_decode(*inputs, slopes))
    for cache, expected in zip(caches, reference(*inputs)[1:], strict=True):
        np.testing.assert_array_equal(cache, expected)
    exact = [x.astype(jnp.float32) for x in inputs[:5]]
    expected = reference(*exact, *inputs[5:])[0]
    assert out.dtype == dtype
    assert np.all(np.asarray(out[-1]) == 0)
    return float(np.abs(np.asarray(out, np.float32) - np.asarray(expected)).max())


@settings(max_examples=12)
@given(
    used=st.lists(st.floats(0, 0.999), min_size=2, max_size=3), N=st.integers(1, 5), S=st.sampled_from([64, 128, 256]),
    alibi=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_fp32(used: list[float], N: int, S: int, alibi: bool, seed: int):
    assert compare([int(share * S) for share in used], N, S, alibi, jnp.float32, seed) < 2e-6


@pytest.mark.parametrize("alibi", [True, False])
def test_bf16(alibi: bool):
    assert compare([200, 0, 17, 255, 31], 5, 256, alibi, jnp.bfloat16) < 2e-2


def test_reference_is_plain_indexing():
    lengths = [5, 0, 11, 16, 3]  # the fourth is full
    q, k_new, v_new, k, v, layer, length, own, slots = make_inputs(lengths, 2, 16, jnp.float32)
    out, *caches = reference_decode(q, k_new, v_new, k, v, layer, length, own, slots, None)
    k, v = (np.array(x) for x in (k, v))
    for b, n in enumerate(lengths):
        if n < 16:
            k[1, b, :, n], v[1, b, :, n] = k_new[b], v_new[b]
    np.testing.assert_array_equal(caches[0], k)
    np.testing.assert_array_equal(caches[1], v)
    for b in (0, 2):
        visible = slice(lengths[b] // 3, lengths[b] + 1)
        scores = np.einsum("NH,NSH->NS", q[b], k[1, b, :, visible]) / 4
        p = np.exp(scores - scores.max(1, keepdims=True))
        expected = np.einsum("NS,NSH->NH", p / p.sum(1, keepdims=True), v[1, b, :, visible])
        np.testing.assert_allclose(out[b], expected, atol=1e-5)


@pytest.mark.parametrize("lengths", [[0, 127, 5], [128, 1, 0], [383, 64, 300], [384, 200, 384]])
def test_blocks_behind_the_last_slot_are_not_read(lengths: list[int], monkeypatch):
    """Nor is anything written but the slot of the new token; a full row has none."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 128 * 3 * 16 * 4)
    q, k_new, v_new, k, v, layer, length, own, slots = make_inputs(lengths, 3, 384, jnp.float32)
    assert block_length(384, 3 * 16 * 4) == 128
    ends = (length // 128 + 1) * 128
    behind = (jnp.arange(384) >= ends[:, None])[None, :, None, :, None]
    spoilt = [jnp.where(behind, jnp.nan, x) for x in (k, v)]
    run = jax.jit(lambda k, v: flash_decode(q, k_new, v_new, k, v, layer, length, own, slots, None, interpret=True))
    out, *caches = run(*spoilt)
    np.testing.assert_array_equal(out, run(k, v)[0])
    for cache, before, new in zip(caches, spoilt, (k_new, v_new), strict=True):
        expected = np.array(before)
        for b, n in enumerate(lengths):
            if n < 384:
                expected[1, b, :, n] = new[b]
        np.testing.assert_array_equal(cache, expected)


def test_block_length():
    slot = 5 * 128 * 2  # 13B on 8 chips
    assert block_length(4096, slot) == 1024
    assert block_length(4096, 2 * slot) == 512
    assert block_length(2304, slot) == 1152
    assert block_length(64, slot) == 64
    # No block is small enough: the smallest that the hardware takes.
    assert block_length(256, 2**20) == 128
