"""The sizes of logits, and the repetition penalty as transformers computes it."""

from __future__ import annotations

import jax
import numpy as np

from bc2_jax.demo.curves import SMOOTHING, smoothed
from bc2_jax.demo.penalties import PENALTIES, compare, penalize


def test_the_penalty_is_that_of_transformers() -> None:
    """transformers' rule written as a loop over positions and earlier tokens."""
    key = jax.random.key(0)
    logits = np.asarray(3 * jax.random.normal(key, (2, 7, 11)))
    ids = np.asarray(jax.random.randint(key, (2, 7), 0, 11))
    expected = logits.copy()
    for b, t in np.ndindex(ids.shape):
        for token in set(ids[b, : t + 1].tolist()):
            score = expected[b, t, token]
            expected[b, t, token] = score * 1.3 if score < 0 else score / 1.3
    np.testing.assert_allclose(penalize(logits, ids, 1.3), expected, rtol=1e-6)


def test_a_constant_added_to_all_logits_changes_what_a_penalty_does() -> None:
    """The probabilities are the same, but the penalty is not: why the report wants small logits."""
    key = jax.random.key(1)
    logits = jax.random.normal(key, (2, 16, 32))
    ids = jax.random.randint(key, (2, 16), 0, 32)
    small, large = compare(logits, ids, ids), compare(logits + 20, ids, ids)
    np.testing.assert_allclose(small["loss"], large["loss"], rtol=1e-5)
    np.testing.assert_allclose(large["largest_logit"] - small["largest_logit"], 20, rtol=1e-5)
    for penalty in map(str, PENALTIES):
        assert large["penalties"][penalty]["kl"] > 2 * small["penalties"][penalty]["kl"] > 0
        assert large["penalties"][penalty]["changed"] >= small["penalties"][penalty]["changed"]


def test_a_smoothed_curve_is_a_running_mean() -> None:
    values = [float(n) for n in range(2 * SMOOTHING)]
    found = smoothed(values)
    assert found[:3] == [0.0, 0.5, 1.0]
    assert found[-1] == sum(values[-SMOOTHING:]) / SMOOTHING
