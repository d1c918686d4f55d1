"""Sampling against a brute force in numpy, one row and one token at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.infer.sampling import penalize_repetition, sample_tokens, sampling_candidates

# Eighths, so that sums and comparisons are exact and ties are frequent.
# Few sizes, so that few operations are compiled.
LOGITS = (
    st.sampled_from([1, 3, 12])
    .flatmap(lambda n: st.lists(st.integers(-40, 40), min_size=n, max_size=n))
    .map(lambda values: [i / 8 for i in values])
)


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability, in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = {i: np.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total, kept, share = sum(weights.values()), {}, 0.0
    for i in order:
        if top_p < 1 and share / total >= top_p:
            break
        kept[i] = weights[i]
        share += weights[i]
    return {i: w / sum(kept.values()) for i, w in kept.items()}


def probabilities(logits, temperature, top_k, top_p) -> dict[int, float]:
    ids, weights = sampling_candidates(jnp.float32([logits]), temperature, top_k, top_p)
    p = np.asarray(jax.nn.softmax(weights[0]))
    return {int(i): float(q) for i, q, w in zip(ids[0], p, weights[0], strict=True) if np.isfinite(w)}


@given(
    LOGITS,
    st.sampled_from([0.1, 0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 5, 14]),
    st.sampled_from([1.0, 0.97, 0.853, 0.511, 1e-9]),
)
def test_candidates_match_brute_force(logits, temperature, top_k, top_p):
    expected = brute_force(logits, temperature, top_k, top_p)
    got = probabilities(logits, temperature, top_k, None if top_p == 1 else top_p)
    cut = {i for i in expected if expected[i] < 1e-30}  # fp32 ends somewhere; no token is gained
    assert expected.keys() - cut <= got.keys() <= expected.keys()
    np.testing.assert_allclose([got[i] for i in got], [expected[i] for i in got], rtol=1e-4, atol=1e-7)


@given(LOGITS, st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from([0.5, 1.0, 1.05, 2.0]))
def test_penalty_matches_brute_force(logits, seen, penalty):
    seen = seen[: len(logits)]
    expected = [(x / penalty if x > 0 else x * penalty) if s else x for x, s in zip(logits, seen, strict=True)]
    got = penalize_repetition(jnp.float32([logits]), jnp.array([seen]), penalty)
    np.testing.assert_allclose(got[0], np.float32(expected), rtol=1e-6)


def test_rows_have_their_own_settings():
    logits, temperature, top_p = [0.5, 2.0, -1.0, 1.5], jnp.array([0.7, 1.3, 0.0]), jnp.array([0.6, 1.0, 0.9])
    ids, weights = sampling_candidates(jnp.float32([logits] * 3), temperature, 0, top_p)
    for row in range(2):
        expected = brute_force(logits, float(temperature[row]), 0, float(top_p[row]))
        p = np.asarray(jax.nn.softmax(weights[row]))
        got = {int(i): float(q) for i, q, w in zip(ids[row], p, weights[row], strict=True) if np.isfinite(w)}
        assert got.keys() == expected.keys()
        np.testing.assert_allclose([got[i] for i in got], [expected[i] for i in got], rtol=1e-5)
    ties = jnp.float32([[1.0, 3.0, 3.0, 3.0]] * 3)
    keys = jax.random.split(jax.random.key(0), 3)
    assert int(sample_tokens(ties, keys, temperature=temperature, top_p=top_p)[2]) == 1  # greedy beside drawn rows
    penalty = jnp.array([1.0, 2.0])
    penalized = penalize_repetition(jnp.float32([[4.0, -4.0]] * 2), jnp.ones((2, 2), bool), penalty)
    np.testing.assert_array_equal(penalized, [[4.0, -4.0], [2.0, -8.0]])


def test_ties_go_to_the_smaller_id():
    logits = [1.0, 3.0, 3.0, 3.0, 2.0]
    assert probabilities(logits, 1.0, 2, None).keys() == {1, 2}
    assert probabilities(logits, 1.0, 3, 0.5).keys() == {1, 2}  # 1/3 is not yet a half
    assert int(sample_tokens(jnp.float32([logits]), jax.random.split(jax.random.key(0), 1), temperature=None)[0]) == 1


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-38, 1e-44])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, None), (3, 0.9), (0, 0.9)])
def test_tiny_temperature_is_greedy_and_never_nan(temperature, top_k, top_p):
    logits = jnp.float32([[-3.0, 70.0, 69.0, -80.0], [0.0, -1.0, 2.0, 1.0]])
    keys = jax.random.split(jax.random.key(3), 2)
    tokens = sample_tokens(logits, keys, temperature=np.float32(temperature), top_k=top_k, top_p=top_p)
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, None), (4, None), (0, 0.8), (4, 0.9)])
def test_frequencies(top_k, top_p):
    logits, draws = [0.5, 2.0, -1.0, 1.5, 1.0, 0.0], 20_000
    expected = brute_force(logits, 0.7, top_k, 1.0 if top_p is None else top_p)
    rows = jnp.broadcast_to(jnp.float32(logits), (draws, len(logits)))
    tokens = sample_tokens(rows, jax.random.split(jax.random.key(0), draws), temperature=0.7, top_k=top_k, top_p=top_p)
    counts = np.bincount(tokens, minlength=len(logits))
    assert {int(i) for i in np.flatnonzero(counts)} == expected.keys()
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    assert chi_square < 21  # beyond the 99.9 % point of 5 degrees of freedom


def test_a_row_does_not_depend_on_the_others():
    logits = jax.random.normal(jax.random.key(1), (8, 50))
    keys = jax.random.split(jax.random.key(2), 8)
    sample = jax.jit(lambda logits, keys: sample_tokens(logits, keys, temperature=1.0, top_k=20, top_p=0.9))
    together = sample(logits, keys)
    alone = [sample(logits[i : i + 1], keys[i : i + 1]) for i in range(8)]
    assert together.dtype == jnp.int32
    np.testing.assert_array_equal(together, np.concatenate(alone))
