"""Attention to the KV cache against plain numpy, and that a row's bits are its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.kernels.cached import BLOCK, LANES, KVCache, Place, cached_attention, quantize_tokens
from bc2_jax.model.position import alibi_slopes

L, B, N, H, LAYER = 2, 4, 3, 8, 1


def make_cache(S: int, kv: str = "float32", seed: int = 0) -> KVCache:
    """Every slot holds something, whether it is in use or not."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(L, B, N, S, H)).astype(np.float32) for _ in "kv")
    if kv == "int8":
        (k, k_scale), (v, v_scale) = (quantize_tokens(jnp.asarray(x)) for x in (k, v))
        return KVCache(k, v, *(x.reshape(*x.shape[:3], -1, LANES) for x in (k_scale, v_scale)))
    return KVCache(jnp.asarray(k, kv), jnp.asarray(v, kv), None, None)


def flat(scale):
    """[L, B, N, S / LANES, LANES] -> [L, B, N, S]."""
    return scale.reshape(*scale.shape[:3], -1)


def as_float64(cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [L, B, N, S, H], int8 ones multiplied with their scales."""
    found = [np.asarray(x, np.float64) for x in (cache.k, cache.v)]
    if cache.k_scale is not None:
        found = [x * flat(np.asarray(s, np.float64))[..., None] for x, s in zip(found, cache[2:], strict=True)]
    return found[0], found[1]


def numpy_attention(q_TNH, k_NSH, v_NSH, start: int, slopes) -> np.ndarray:
    """fp64 [T, N, H]: each query, at position start + t, to the slots from the first to its own."""
    out = np.zeros(q_TNH.shape)
    for t, q_NH in enumerate(np.asarray(q_TNH, np.float64)):
        used = slice(start + t + 1)
        scores = np.einsum("NH,NSH->NS", q_NH, k_NSH[:, used]) / np.sqrt(q_NH.shape[-1])
        if slopes is not None:
            scores -= np.asarray(slopes, np.float64)[:, None] * (start + t - np.arange(start + t + 1))
        p = np.exp(scores - scores.max(1, keepdims=True))
        out[t] = np.einsum("NS,NSH->NH", p / p.sum(1, keepdims=True), v_NSH[:, used])
    return out


def random_tokens(R: int, T: int, seed: int, dtype="float32") -> list[jax.Array]:
    """q, k and v of new tokens."""
    return [jnp.asarray(x, dtype) for x in np.random.default_rng(seed).normal(size=(3, R, T, N, H))]


@functools.cache
def runner(alibi: bool):
    """jitted (q, k, v, cache, place) -> result and cache, in layer LAYER."""
    slopes = jnp.asarray(alibi_slopes(N))

    def run(q, k, v, cache, place):
        slopes_RN = jnp.broadcast_to(slopes, (len(q), N)) if alibi else None
        return cached_attention(q, k, v, cache, jnp.int32(LAYER), place, slopes_RN)

    return jax.jit(run)


def attend(new, cache: KVCache, rows, start, alibi: bool = True) -> tuple[np.ndarray, KVCache]:
    place = Place(*(jnp.asarray(x, jnp.int32) for x in (rows, start)))
    return jax.tree.map(np.asarray, runner(alibi)(*new, cache, place))


def check(new, cache: KVCache, rows, start, alibi: bool, tolerance: float) -> None:
    """Only the slots of the new tokens change; each token gets what numpy computes from the cache."""
    T, out, after = new[0].shape[1], *attend(new, cache, rows, start, alibi)
    assert out.dtype == new[0].dtype
    expected = jax.tree.map(np.array, cache)
    news = [np.asarray(x) for x in new[1:]]
    if cache.k_scale is not None:
        news = [np.asarray(x) for x in (*quantize_tokens(new[1]), *quantize_tokens(new[2]))]
        news = [news[i] for i in (0, 2, 1, 3)]
    for r, (row, first) in enumerate(zip(rows, start, strict=True)):
        if first >= 0:
            for x, values in zip(expected, news, strict=False):
                if x is not None:
                    slots = x if x.shape[3] == cache.k.shape[3] else flat(x)  # a view
                    slots[LAYER, row, :, first : first + T] = np.swapaxes(values[r], 0, 1)
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    k, v = as_float64(after)
    for r, (row, first) in enumerate(zip(rows, start, strict=True)):
        if first >= 0:
            wanted = numpy_attention(new[0][r], k[LAYER, row], v[LAYER, row], first, alibi_slopes(N) if alibi else None)
            np.testing.assert_allclose(np.asarray(out[r], np.float64), wanted, atol=tolerance)


# -------------------------------------------------------------------------------------------------------------- values


@settings(max_examples=12)
@given(
    start=st.lists(st.integers(-1, 2 * BLOCK - 1), min_size=B, max_size=B), alibi=st.booleans(),
    kv=st.sampled_from(["float32", "int8"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_token_of_each_row(start: list[int], alibi: bool, kv: str, seed: int):
    check(random_tokens(B, 1, seed), make_cache(2 * BLOCK, kv, seed), range(B), start, alibi, 2e-6)


@settings(max_examples=12)
@given(
    rows=st.permutations(range(B)), start=st.lists(st.integers(-1, 2 * BLOCK - 20), min_size=2, max_size=2),
    kv=st.sampled_from(["float32", "int8"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_chunk_of_some_rows(rows: list[int], start: list[int], kv: str, seed: int):
    """At any start, across the border of two blocks too."""
    check(random_tokens(2, 20, seed), make_cache(2 * BLOCK, kv, seed), rows[:2], start, True, 2e-6)


@pytest.mark.parametrize(("rows", "start"), [([2], [120]), (range(B), [0, 236, -1, 100])])
def test_a_chunk_of_one_row_and_of_all(rows, start):
    check(random_tokens(len(rows), 20, 0), make_cache(2 * BLOCK), rows, start, False, 2e-6)


@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_a_chunk_of_whole_rows_of_lanes(kv: str):
    check(random_tokens(2, LANES, 0), make_cache(3 * BLOCK, kv), [3, 1], [BLOCK, 2 * BLOCK], True, 2e-6)


@pytest.mark.parametrize("T", [1, 20])
def test_bf16(T: int):
    new = random_tokens(B, T, 0, "bfloat16")
    check(new, make_cache(2 * BLOCK, "bfloat16"), range(B), [0, 200, 17, 127], True, 1.5e-2)


def test_int8_is_near_the_exact_values():
    """The largest of 8 values is 127 steps: a value is off by 0.4 % of it at most, a result by little more."""
    new, cache = random_tokens(B, 20, 0), make_cache(2 * BLOCK)
    start = [0, 236, 100, 128]
    exact = attend(new, cache, range(B), start)[0]
    error = np.abs(attend(new, make_cache(2 * BLOCK, "int8"), range(B), start)[0] - exact)
    assert 1e-4 < error.max() < 3e-2


def test_quantized_tokens_are_right_to_half_a_step():
    x = np.random.default_rng(0).normal(size=(5, 3, H)).astype(np.float32) * np.logspace(-6, 6, 5)[:, None, None]
    x[0, 0] = 0
    q, scale = (np.asarray(x) for x in quantize_tokens(jnp.asarray(x, jnp.float32)))
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale[0, 0] == 0 and not q[0, 0].any()
    assert np.all(np.abs(q * scale[..., None] - x) <= 0.5001 * scale[..., None])
    assert np.all(np.abs(q).max(-1)[scale > 0] == 127)


# ---------------------------------------------------------------------------------------------------------- own bits


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_bits_depend_neither_on_the_slots_nor_on_other_rows(T: int, kv: str):
    """Row 0 at slot 100: beside rows that are far longer or idle, with other slots, as another row, among fewer."""
    new, cache = random_tokens(B, T, 0), make_cache(BLOCK, kv)
    expected = attend(new, cache, range(B), [100, -1, -1, -1])[0][0]

    def moved(row: int, slots: int, start: list[int], R: int = B, spoil: bool = False) -> np.ndarray:
        """The same with row 0 in another place; with `spoil` the rows after it are not finite."""
        others, larger = random_tokens(R, T, 1), make_cache(slots, kv, seed=1)
        if spoil:
            larger = KVCache(
                *(x if x is None or x.dtype == jnp.int8 else x.at[:, row + 1 :].set(jnp.nan) for x in larger)
            )
        larger = jax.tree.map(lambda x, own: x.at[:, row, :, : own.shape[3]].set(own[:, 0]), larger, cache)
        rows = range(B) if R == B else [row, 3]
        place = row if R == B else 0
        tokens = [x.at[place].set(own[0]) for x, own in zip(others, new, strict=True)]
        return attend(tokens, larger, rows, start)[0][place]

    for found in (
        moved(0, 3 * BLOCK, [100, 3 * BLOCK - T, 7, -1]),
        moved(2, 3 * BLOCK, [200, 300, 100, 0]),
        moved(1, 3 * BLOCK, [-1, 100, -1, -1], spoil=True),
        moved(1, 3 * BLOCK, [100, 300], R=2),
    ):
        np.testing.assert_array_equal(found, expected)


def test_one_token_after_the_other_is_as_a_chunk():
    """To rounding, for another number of tokens is another matmul; what is kept of them is the same to the bit."""
    new, start = random_tokens(B, 20, 0), np.array([0, 120, 7, 230])
    out, expected = attend(new, make_cache(2 * BLOCK), range(B), start)
    cache, found = make_cache(2 * BLOCK), []
    for t in range(20):
        one, cache = attend([x[:, t : t + 1] for x in new], cache, range(B), start + t)
        found.append(one)
    np.testing.assert_allclose(np.concatenate(found, 1), out, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, cache, expected)


def test_no_token_is_written_behind_the_last_slot():
    cache = make_cache(BLOCK)
    _, after = attend(random_tokens(B, 1, 0), cache, range(B), [BLOCK, -1, BLOCK, -1])
    jax.tree.map(np.testing.assert_array_equal, after, jax.tree.map(np.asarray, cache))
