"""The decoding kernel in interpret mode against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.kernels import flash_decode as module
from bc2_jax.kernels.attention import Tokens, reference_attention
from bc2_jax.kernels.flash_decode import block_length, flash_decode
from bc2_jax.model.position import alibi_slopes


def make_inputs(B: int, N: int, S: int, length: int, dtype, seed: int = 0):
    """Row b has b * length / 3 slots of padding on the left; the last row is padding throughout."""
    rng = np.random.default_rng(seed)
    L, H = 2, 16
    q = jnp.asarray(rng.normal(size=(B, N, H)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(L, B, N, S, H)), dtype) for _ in "kv")
    start = np.arange(B)[:, None] * length // 3
    segments = ((np.arange(S) >= start) & (np.arange(S) <= length)).astype(np.int32)
    segments[-1] = 0
    positions = np.maximum(np.arange(S, dtype=np.int32) - start, 0)
    slots = Tokens(jnp.asarray(positions, jnp.int32), jnp.asarray(segments))
    one = slice(length, length + 1)
    return q, k, v, Tokens(slots.positions[:, one], slots.segments[:, one]), slots


def compare(B: int, N: int, S: int, length: int, alibi: bool, dtype, seed: int = 0) -> float:
    q, k, v, token, slots = make_inputs(B, N, S, length, dtype, seed)
    slopes = jnp.asarray(alibi_slopes(N)) if alibi else None
    layer, end = jnp.int32(1), jnp.int32(length)
    out = flash_decode(q, k, v, layer, end, token, slots, slopes, interpret=True)
    k, v = (jnp.swapaxes(x[1].astype(jnp.float32), 1, 2) for x in (k, v))
    expected = reference_attention(q[:, None].astype(jnp.float32), k, v, token, slots, slopes, length)[:, 0]
    assert out.dtype == dtype
    assert np.all(np.asarray(out[-1]) == 0)
    return float(np.abs(np.asarray(out, np.float32) - np.asarray(expected)).max())


@settings(max_examples=12)
@given(
    B=st.integers(2, 3), N=st.integers(1, 5), S=st.sampled_from([64, 128, 256]), used=st.floats(0, 0.999),
    alibi=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_fp32(B: int, N: int, S: int, used: float, alibi: bool, seed: int):
    assert compare(B, N, S, int(used * S), alibi, jnp.float32, seed) < 2e-6


@pytest.mark.parametrize("alibi", [True, False])
def test_bf16(alibi: bool):
    assert compare(3, 5, 256, 200, alibi, jnp.bfloat16) < 2e-2


@pytest.mark.parametrize("length", [0, 127, 128, 300, 383])
def test_blocks_behind_the_last_slot_are_not_read(length: int, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 128 * 3 * 16 * 4)
    q, k, v, token, slots = make_inputs(2, 3, 384, length, jnp.float32)
    end = (length // 128 + 1) * 128
    assert block_length(384, 3 * 16 * 4) == 128
    spoilt = [x.at[:, :, :, end:].set(jnp.nan) for x in (k, v)]
    run = jax.jit(lambda k, v: flash_decode(q, k, v, jnp.int32(0), jnp.int32(length), token, slots, None,
                                            interpret=True))  # fmt: skip
    np.testing.assert_array_equal(run(*spoilt), run(k, v))


def test_block_length():
    slot = 5 * 128 * 2  # 13B on 8 chips
    assert block_length(4096, slot) == 1024
    assert block_length(4096, 2 * slot) == 512
    assert block_length(2304, slot) == 1152
    assert block_length(64, slot) == 64
    # No block is small enough: the smallest that the hardware takes.
    assert block_length(256, 2**20) == 128
