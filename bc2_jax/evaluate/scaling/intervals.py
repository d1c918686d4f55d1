"""Confidence intervals of a fit: bootstrap over runs, and profiles of the objective with Student's t.

A bootstrap alone is too narrow for few runs: with seven runs and three parameters its 95 % intervals contain the truth
in 57 % of simulated ladders. So an end of an interval is the outer one of two:

- the percentile of a bootstrap over runs (not checkpoints, which are dependent), which reflects outliers and unequal
  noise;
- the profile: how far the value can move, with all else refitted, until the objective has grown by what Student's t
  with (runs - parameters) degrees of freedom allows. The noise is from residuals, clipped (Huber's proposal 2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bc2_jax.evaluate.scaling.huber import Problem, huber, log_loss, minimise_again

CLIP = 2.0  # standard deviations beyond which a residual is an outlier
_CLIPPED_VARIANCE = 0.9205  # variance of a standard normal variable clipped at CLIP
_PULL = 30.0
"""Weight, in runs, of the point that pulls the law away from the fit. Any weight ends on the profile; a heavy one makes
the problem stiff."""
_FARTHEST = 40.0  # log distance from the fit beyond which an end is infinity (or 0)
_BISECTIONS = 10


class Noise(NamedTuple):
    """The scatter of the runs about the law."""

    theta_P: np.ndarray  # coefficients of the fit with delta = CLIP x noise
    deviation: float  # standard deviation of log loss with `freedom` degrees of freedom
    freedom: int  # runs minus parameters
    unit: float  # growth of the objective per unit of t^2

    @property
    def delta(self) -> float:
        return CLIP * self.deviation


def estimate_noise(theta_P: np.ndarray, problem: Problem) -> Noise:
    """From the residuals of the best fit; needs more points than coefficients."""
    count = int(np.count_nonzero(problem.weights))
    freedom = count - len(theta_P)
    share = problem.weights * count / problem.weights.sum()
    theta = theta_P[None]

    def residuals() -> np.ndarray:
        return np.abs(log_loss(theta, problem.x)[0] - problem.y)

    deviation = np.sqrt(np.sum(share * residuals() ** 2) / freedom)
    for _ in range(30):
        deviation = max(deviation, 1e-9)  # points exactly on the law
        theta, _ = minimise_again(theta, problem._replace(weights=share, delta=CLIP * deviation), 100)
        clipped = np.minimum(residuals(), CLIP * deviation)
        new = np.sqrt(np.sum(share * clipped**2) / freedom / _CLIPPED_VARIANCE)
        is_done, deviation = abs(new - deviation) <= 1e-4 * deviation, new
        if is_done:
            break
    deviation = max(deviation, 1e-9)
    clipped = np.minimum(residuals(), CLIP * deviation)
    inside = np.sum(share * (residuals() <= CLIP * deviation)) / count
    return Noise(theta[0], deviation, freedom, 0.5 * np.sum(share * clipped**2) / freedom / max(inside, 0.5))


class Target(NamedTuple):
    """The log loss at a place, or a coefficient with the origin at a place."""

    place: np.ndarray  # logarithms of the quantities, [F], relative to the middle of the points
    coefficient: int | None = None  # none for the log loss


def profile(targets: list[Target], problem: Problem, noise: Noise, allowed: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends (low [targets], high [targets]) at which the objective has grown by `allowed` units of t^2.

    All ends are found in parallel, by doubling and bisection.
    """
    both = [(target, sign) for target in targets for sign in (-1.0, 1.0)]
    held = _Held([target for target, _ in both], problem, noise)
    sign_B, limit = np.array([sign for _, sign in both]), allowed * noise.unit
    step_B = np.full(len(both), 0.5 * noise.deviation)
    inner_B, outer_B = np.zeros(len(both)), np.full(len(both), np.inf)
    ends_B = sign_B * np.inf
    while True:  # double until outside
        todo = np.flatnonzero(np.isinf(outer_B) & (step_B < _FARTHEST))
        if not len(todo):
            break
        is_out, reached = held.pull(todo, sign_B[todo] * step_B[todo], limit)
        outer_B[todo[is_out]], ends_B[todo[is_out]] = step_B[todo[is_out]], reached[is_out]
        inner_B[todo[~is_out]] = step_B[todo[~is_out]]
        step_B[todo] *= 2
    todo = np.flatnonzero(np.isfinite(outer_B))
    for _ in range(_BISECTIONS):
        if not len(todo):
            break
        middle = 0.5 * (inner_B[todo] + outer_B[todo])
        is_out, reached = held.pull(todo, sign_B[todo] * middle, limit)
        outer_B[todo[is_out]], ends_B[todo[is_out]] = middle[is_out], reached[is_out]
        inner_B[todo[~is_out]] = middle[~is_out]
    ends = ends_B.reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


class _Held:
    """Problems that each hold one target away from the fit while all else is refitted."""

    def __init__(self, targets: list[Target], problem: Problem, noise: Noise):
        count, (n, num), size = len(targets), problem.x.shape, len(noise.theta_P)
        places = np.array([target.place for target in targets])
        is_loss = np.array([target.coefficient is None for target in targets])
        # A coefficient's problem has its origin at the place, a loss's an additional point there.
        origin = np.where(is_loss[:, None], 0.0, places)
        self._x = np.concatenate(
            [problem.x - origin[:, None], np.where(is_loss[:, None], places, 0.0)[:, None]], axis=1
        )
        self._y = np.concatenate([np.broadcast_to(problem.y, (count, n)), np.zeros((count, 1))], axis=1)
        share = problem.weights * np.count_nonzero(problem.weights) / problem.weights.sum()
        self._weights = np.concatenate([np.broadcast_to(share, (count, n)), _PULL * is_loss[:, None]], axis=1)
        self._delta = np.append(np.full(n, noise.delta), np.inf)
        theta = np.repeat(noise.theta_P[None], count, axis=0)
        theta[:, :num] -= theta[:, num + 1 :] * origin
        self.fixed_BP = np.zeros((count, size), bool)
        for row, target in enumerate(targets):
            if target.coefficient is not None:
                self.fixed_BP[row, target.coefficient] = True
        at_place = log_loss(theta, self._x)[:, -1]
        self.values_B = np.where(is_loss, at_place, np.sum(theta * self.fixed_BP, axis=1))
        self._theta, self._is_loss = theta, is_loss
        self._base = self._objective(np.arange(count), theta)

    def _objective(self, rows: np.ndarray, theta: np.ndarray) -> np.ndarray:
        residuals = (log_loss(theta, self._x[rows]) - self._y[rows])[:, :-1]
        return np.sum(self._weights[rows, :-1] * huber(residuals, self._delta[:-1]), axis=1)

    def pull(self, rows: np.ndarray, distance: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """Pulls the targets of `rows` by `distance` -> (whether the objective grows by more than `limit`, the targets'
        values)."""
        wanted, is_loss = self.values_B[rows] + distance, self._is_loss[rows]
        y, theta, fixed = self._y[rows].copy(), self._theta[rows], self.fixed_BP[rows]
        y[:, -1] = wanted
        theta = np.where(fixed, wanted[:, None], theta)
        problem = Problem(self._x[rows], y, self._weights[rows], self._delta)
        theta, _ = minimise_again(theta, problem, 150, fixed, 1e-8)
        is_out = self._objective(rows, theta) - self._base[rows] > limit
        self._theta[rows[~is_out]] = theta[~is_out]
        reached = np.where(is_loss, log_loss(theta, self._x[rows])[:, -1], wanted)
        return is_out, reached


def resample(theta_P: np.ndarray, problem: Problem, replicates: int, seed: int) -> np.ndarray:
    """Coefficients [replicates, P] of fits to resampled runs, each with more distinct runs than coefficients."""
    rng, n, size = np.random.default_rng(seed), len(problem.y), len(theta_P)
    least = min(size + 1, n - 1)
    weights = np.empty((replicates, n))
    for row in range(replicates):
        while True:
            counts = np.bincount(rng.integers(0, n, n), minlength=n)
            if np.count_nonzero(counts * problem.weights) >= least:
                break
        weights[row] = counts
    theta = np.repeat(theta_P[None], replicates, axis=0)
    return minimise_again(theta, problem._replace(weights=weights * problem.weights), 60, tolerance=1e-8)[0]
