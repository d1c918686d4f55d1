"""Fits against recorded independent ones; intervals against a grid and against simulated ladders."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import stdtrit

from bc2_jax.evaluate.scaling import Fit, fit_compute, fit_surface, huber

GOLDEN = Path(__file__).parents[2] / "golden" / "evals" / "scaling"
ANSWERS = json.loads((GOLDEN / "answers.json").read_text())
LADDER = [4.152361e20, 9.7861632e20, 1.5207629e21, 3.2405914e21, 7.2418591e21, 1.2403507e22, 2.2268805e22]


def points(prefix: str, file: str = "points.csv") -> dict[str, np.ndarray]:
    rows = list(csv.DictReader((GOLDEN / file).open()))
    chosen = [row for row in rows if next(iter(row.values())).startswith(prefix)]
    return {name: np.array([float(row[name]) for row in chosen]) for name in ("N", "D", "C", "loss")}


@pytest.fixture(scope="module")
def surface() -> Fit:
    p = points("surface")
    return fit_surface(p["N"], p["D"], p["loss"])


@pytest.fixture(scope="module")
def ladder() -> Fit:
    p = points("paper_form:h")
    return fit_compute(p["C"], p["loss"])


def test_the_surface_is_the_reference_and_holds_the_truth(surface: Fit):
    reference, truth = ANSWERS["reference"]["surface_fit"], ANSWERS["true"]["surface"]
    assert surface.objective <= reference["huber"] * (1 + 1e-9)
    assert surface.parameters == pytest.approx({k: v for k, v in reference.items() if k != "huber"}, rel=1e-6)
    ends = surface.interval()
    assert all(ends[name][0] < truth[name] < ends[name][1] for name in truth)
    assert surface.interval("alpha") == ends["alpha"]
    assert surface.noise == pytest.approx(0.004, rel=0.3)  # four outliers of 6 to 15 % are no noise


def test_the_papers_form_is_the_reference_and_holds_the_truth(ladder: Fit):
    reference = ANSWERS["reference"]
    assert ladder.objective <= reference["paper_form_fit"]["huber"] * (1 + 1e-9)
    for target in reference["targets"].values():
        assert ladder.predict(target["C"]) == pytest.approx(target["predicted"], abs=1e-6)
        low, high = ladder.interval(target["C"])
        inner_low, inner_high = ladder.interval(target["C"], level=0.8)
        assert low < inner_low < target["true"] < inner_high < high
    truth, ends = ANSWERS["true"]["paper_form"], ladder.interval()
    assert all(ends[name][0] <= truth[name] <= ends[name][1] for name in truth)


def test_olmos_ladder_misses_its_targets_as_it_does():
    p = points("", "olmo_ladder_c4.csv")
    per_parameter = p["D"] / p["N"]
    names = [row["run"] for row in csv.DictReader((GOLDEN / "olmo_ladder_c4.csv").open())]
    is_target = np.array([name.startswith("target") for name in names])
    is_rerun = np.array([name.endswith("rerun") for name in names])
    fitted = ~is_target & ~is_rerun & (p["N"] < 2e9) & (per_parameter > 15)
    assert fitted.sum() == 16
    fit = fit_surface(*(p[name][fitted] for name in ("N", "D", "loss")))
    assert fit.objective == pytest.approx(3.2093991e-05, rel=1e-6)
    errors = fit.predict(p["N"][is_target], p["D"][is_target]) / p["loss"][is_target] - 1
    np.testing.assert_allclose(errors, [-0.0189, -0.0366], atol=1e-4)


def test_profiles_are_those_of_a_grid():
    """All slopes and floors of a grid, the factor solved for each: what the objective allows of a prediction."""
    noise = np.random.default_rng(3).standard_normal(7)
    fit = fit_compute(LADDER, (85 * np.array(LADDER) ** -0.082 + 1.58) * np.exp(0.002 * noise), replicates=1)
    goal = 1.1743254e23
    found = np.log(fit.interval(goal))
    x, y, scatter = fit.problem.x[:, 0], fit.problem.y, fit._noise
    s = np.geomspace(0.01, 0.5, 120)[:, None, None]
    e = np.concatenate([[-30], np.linspace(-3, y.min() - 0.002, 200)])[None, :, None]
    c = np.log(np.exp(y.mean()) - np.exp(e)) + 0 * s
    for _ in range(40):
        mean = np.logaddexp(c - s * x, e)
        share = np.exp(c - s * x - mean)
        slope = np.sum(np.clip(mean - y, -scatter.delta, scatter.delta) * share, axis=-1, keepdims=True)
        bend = np.sum(share**2 * (1e-3 + (np.abs(mean - y) <= scatter.delta)), axis=-1, keepdims=True)
        c = c - np.clip(slope / bend, -0.3, 0.3)
    values = huber.huber(np.logaddexp(c - s * x, e) - y, scatter.delta).sum(axis=-1)
    t = stdtrit(4, 0.975)
    allowed = values - values.min() <= t**2 * scatter.unit
    goals = np.logaddexp(c - s * (np.log(goal) - fit.middle[0]), e)[..., 0][allowed]
    centre, own = np.log(fit.predict(goal)), t * scatter.deviation
    expected = centre - np.hypot(centre - goals.min(), own), centre + np.hypot(goals.max() - centre, own)
    np.testing.assert_allclose(found, expected, atol=0.12 * (found[1] - found[0]))
    assert found[0] <= expected[0] + 2e-4
    assert found[1] >= expected[1] - 2e-4


def test_intervals_hold_the_truth_of_simulated_ladders():
    """Seven runs: 95 % of a bootstrap alone hold it in 57 %. These do in nearly all."""
    rng, goal, hits = np.random.default_rng(7), 2.1982819e23, 0
    truth = 85 * goal**-0.082 + 1.58
    for _ in range(6):
        loss = (85 * np.array(LADDER) ** -0.082 + 1.58) * np.exp(0.002 * rng.standard_normal(7))
        low, high = fit_compute(LADDER, loss, replicates=10).interval(goal)
        hits += low <= truth <= high
        assert high / low - 1 < 0.15  # and they say something
    assert hits >= 5


def test_intervals_of_parameters_where_the_best_floor_is_nothing():
    """With so much noise a power law without a floor fits best: that there is one must stay possible."""
    noise = np.random.default_rng(3).standard_normal((9, 7))
    for which in (2, 8):
        fit = fit_compute(LADDER, (85 * np.array(LADDER) ** -0.082 + 1.58) * np.exp(0.02 * noise[which]), replicates=10)
        assert fit.parameters["L_inf"] < 1e-6
        ends = fit.interval()
        assert all(ends[name][0] <= truth <= ends[name][1] for name, truth in ANSWERS["true"]["paper_form"].items())


def test_the_largest_is_predicted_from_the_others(ladder: Fit):
    held = ladder.without_largest()
    assert held is not None
    assert held.at == pytest.approx((LADDER[-1],))
    assert len(held.fit.losses) == 6
    assert abs(held.error) < 0.005
    assert fit_compute(LADDER[:4], ladder.losses[:4]).without_largest() is None


def test_weights_count_as_repetitions():
    p = points("paper_form:h")
    weights = np.array([1, 2, 1, 1, 3, 1, 1])
    weighted = fit_compute(p["C"], p["loss"], weights=weights)
    repeated = fit_compute(np.repeat(p["C"], weights), np.repeat(p["loss"], weights))
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-6)
    left_out = fit_compute(p["C"], p["loss"], weights=[1, 1, 1, 1, 1, 1, 0])
    assert left_out.objective == pytest.approx(fit_compute(p["C"][:6], p["loss"][:6]).objective, rel=1e-6)


def test_shapes_of_a_surface(surface: Fit):
    assert surface.predict([1e8, 1e9], [[1e9], [1e10], [1e11]]).shape == (3, 2)
    with pytest.raises(ValueError, match=r"N and D have the shapes \(2,\) and \(3,\)"):
        surface.predict([1e8, 1e9], [1e9, 1e10, 1e11])


def test_shapes_and_the_shares_of_the_seed(ladder: Fit):
    assert isinstance(ladder.predict(1e22), float)
    grid = np.full((2, 3), 1e22)
    assert ladder.predict(grid).shape == (2, 3)
    assert [ends.shape for ends in ladder.interval(grid)] == [(2, 3), (2, 3)]
    assert [ends.shape for ends in ladder.interval([])] == [(0,), (0,)]
    again = fit_compute(*ladder.inputs, ladder.losses)
    assert again.interval(1e23) == ladder.interval(1e23)


C4 = [1e20, 3e20, 1e21, 3e21]
L4 = [3.2, 3.0, 2.85, 2.75]


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: fit_compute(C4[:2], L4[:2]), "the number of runs = 2 .* 3 parameters"),
        (lambda: fit_compute([1e20, -1, 1e21], L4[:3]), r"C\[1\] = -1.0 .* positive"),
        (lambda: fit_compute(C4, [3.2, 3.0, float("nan"), 2.8]), r"loss\[2\] = nan .* finite"),
        (lambda: fit_compute(C4, L4[:3]), "length of C = 4 .* 3 losses"),
        (lambda: fit_compute([1e20] * 4, L4), "different C = 1 .* at least 3"),
        (lambda: fit_compute(["a"] * 4, L4), "C = .* numbers"),
        (lambda: fit_compute(C4, L4, delta=0), "delta = 0"),
        (lambda: fit_compute(C4, L4, delta="x"), "delta = 'x'"),
        (lambda: fit_compute(C4, L4, replicates=1.5), "replicates = 1.5 .* whole number, at least 1"),
        (lambda: fit_compute(C4, L4, seed=-1), "seed = -1"),
        (lambda: fit_compute(C4, L4, weights=[1, 1, -1, 1]), "weights = "),
        (lambda: fit_compute(C4, L4, weights="abc"), "weights = 'abc' .* numbers"),
        (lambda: fit_compute([C4], [L4]), "one dimension"),
        (lambda: fit_surface([1e8] * 5, np.geomspace(1e9, 1e11, 5), [3.5, 3.2, 3, 2.9, 2.8]), "different N = 1"),
        (
            lambda: fit_surface(np.geomspace(1e7, 1e9, 6), 20 * np.geomspace(1e7, 1e9, 6), np.linspace(4, 3, 6)),
            "go up together",
        ),
        (lambda: fit_compute(C4, L4).interval(1e22, level=95), "level = 95"),
        (lambda: fit_compute(C4, L4).interval(1e22, level="x"), "level = 'x'"),
        (lambda: fit_compute(C4, L4).interval("alpha"), "parameter = 'alpha' .* a, L_inf, b"),
        (lambda: fit_compute(C4[:3], L4[:3]).interval(1e22), "at least 4 runs.* there are 3"),
        (lambda: fit_compute(C4, L4).predict(1e9, 1e9), "predicted at C: 2 values"),
        (lambda: fit_compute(C4, L4).predict(0), "C = 0.0"),
    ),
)
def test_bad_input_is_named(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
