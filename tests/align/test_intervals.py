"""Intervals and tests of counted shares, against SciPy's."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bc2_jax.align.intervals import sign_test, wilson


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_is_scipys(counts, level):
    successes, total = counts
    z = stats.norm.ppf((1 + level) / 2)
    low, high = wilson(successes, total, z)
    expected = stats.binomtest(successes, total).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= low <= successes / total <= high <= 1


def test_wilson_of_few_and_of_none():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0 and 0 < wilson(0, 10)[1] < 0.4
    assert wilson(10, 10) == (1 - wilson(0, 10)[1], 1.0)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize(
    ("successes", "total", "z", "field"),
    [(3, 2, 1.96, "successes"), (-1, 2, 1.96, "successes"), (1.5, 2, 1.96, "successes"), (0, -1, 1.96, "total"),
     (True, 2, 1.96, "successes"), (1, 2, 0, "z"), (1, 2, math.inf, "z"), (1, 2, math.nan, "z")],
)  # fmt: skip
def test_wilson_refuses(successes, total, z, field):
    with pytest.raises(ValueError, match=f"^{field} = "):
        wilson(successes, total, z)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_the_sign_test_is_the_binomial_one(better, worse):
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_refuses_what_is_no_count():
    with pytest.raises(ValueError, match="^worse = -1"):
        sign_test(1, -1)
