"""The minimiser: derivatives against differences, points on a law give the law back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.evaluate.scaling import fit_compute, fit_surface, huber


@pytest.mark.parametrize("num", (1, 2))
def test_a_minimum_is_one_in_every_direction(num: int):
    rng = np.random.default_rng(num)
    x = rng.uniform(-2, 2, (12, num))
    y = np.log(2 + np.exp(-0.4 * x).sum(axis=1)) + 0.01 * rng.standard_normal(12)
    problem = huber.Problem(x, y, rng.uniform(0.5, 2, 12), 0.02)
    theta, value = huber.fit(problem)
    for step in 1e-3 * rng.standard_normal((50, 2 * num + 1)):
        assert huber.objective((theta + step)[None], problem)[0] > value


def test_what_is_fixed_stays():
    x = np.linspace(-1, 1, 8)[:, None]
    problem = huber.Problem(x, np.log(2 + np.exp(-0.5 * x[:, 0])), np.ones(8), 0.01)
    theta, value = huber.minimise(np.array([[0.0, 0.5, 0.9]]), problem, fixed_BP=np.array([[False, False, True]]))
    assert theta[0, 2] == 0.9
    free, least = huber.minimise(theta, problem)
    assert least[0] < value[0]
    np.testing.assert_allclose(free[0], [0.0, np.log(2), 0.5], atol=1e-5)


def test_a_term_that_vanished_comes_back():
    """At a floor of exp(-20) the objective is flat: `minimise` stays there."""
    x = np.linspace(-1, 1, 8)[:, None]
    problem = huber.Problem(x, np.log(2 + np.exp(-0.5 * x[:, 0])), np.ones(8), 0.01)
    start, fixed = np.array([[1.0, -20.0, 0.5]]), np.array([[False, False, True]])
    assert huber.minimise(start, problem, fixed_BP=fixed)[0][0, 1] < -10
    np.testing.assert_allclose(
        huber.minimise_again(start, problem, fixed_BP=fixed)[0][0], [0, np.log(2), 0.5], atol=1e-5
    )


@settings(max_examples=6, deadline=None)
@given(
    b=st.floats(0.05, 0.5), floor=st.floats(0.2, 3.0), above=st.floats(0.3, 3.0), unit=st.floats(1e6, 1e22),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_points_on_a_law_give_it_back(b: float, floor: float, above: float, unit: float, seed: int):
    C = unit * np.geomspace(1, 1e4, 9)[np.random.default_rng(seed).permutation(9)]
    middle = np.exp(np.log(C).mean())
    loss = above * (C / middle) ** -b + floor
    fit = fit_compute(C, loss)
    np.testing.assert_allclose(fit.predict(C), loss, rtol=1e-6)
    np.testing.assert_allclose(fit.predict(1e3 * C.max()), above * (1e3 * C.max() / middle) ** -b + floor, rtol=1e-3)
    assert fit.parameters["b"] == pytest.approx(-b, rel=0.01)


def test_a_surface_gives_itself_back_in_any_units():
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    loss = 1.7 + 400 * N**-0.34 + 1500 * D**-0.31
    fit = fit_surface(N, D, loss)
    truth = {"A": 400, "B": 1500, "E": 1.7, "alpha": 0.34, "beta": 0.31}
    assert fit.parameters == pytest.approx(truth, rel=1e-4)
    assert fit_surface(N / 1e6, D / 1e9, loss).parameters["alpha"] == pytest.approx(0.34, rel=1e-4)
