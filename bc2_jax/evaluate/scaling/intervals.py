"""How sure a fit is: bootstrap over runs, and profiles of the objective with Student's t for few runs.

Of a bootstrap of seven runs under a law of three parameters 95 % intervals hold the truth in 57 % of simulated ladders:
they know nothing of the runs that were not made. So an end of an interval is the outer one of two:

- the percentile of a bootstrap over runs (not over checkpoints of a run, which are not independent), which follows
  outliers and noise that differs between runs;
- the profile: the value up to which the other coefficients can make up for it, where the objective has grown by what
  Student's t, with runs minus parameters degrees of freedom, allows for noise. The noise is that of the residuals,
  large ones clipped (Huber's proposal 2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bc2_jax.evaluate.scaling.huber import Problem, huber, log_loss, minimise_again

CLIP = 2.0
"""Standard deviations of the noise beyond which a residual counts as an outlier."""
_CLIPPED_VARIANCE = 0.9205
"""Of a standard normal variable that is clipped at CLIP."""
_PULL = 30.0
"""Weight, in runs, of the point that pulls the law away from the fit. What it gets to is on the profile whatever its
weight is: a heavy one would only make the problem stiff."""
_FARTHEST = 40.0
"""In logarithms, from the fit; an end beyond it is at infinity (or 0)."""
_BISECTIONS = 10


class Noise(NamedTuple):
    """The scatter of the runs about the law."""

    theta_P: np.ndarray
    """Coefficients of the fit whose delta is CLIP times the noise."""
    deviation: float
    """Standard deviation of log loss, with runs minus parameters degrees of freedom."""
    freedom: int
    unit: float
    """Growth of the objective that stands for one unit of t^2."""

    @property
    def delta(self) -> float:
        return CLIP * self.deviation


def estimate_noise(theta_P: np.ndarray, problem: Problem) -> Noise:
    """From the residuals of the coefficients that fit best; there must be more points than coefficients."""
    count = int(np.count_nonzero(problem.weights))
    freedom = count - len(theta_P)
    share = problem.weights * count / problem.weights.sum()
    theta = theta_P[None]

    def residuals() -> np.ndarray:
        return np.abs(log_loss(theta, problem.x)[0] - problem.y)

    deviation = np.sqrt(np.sum(share * residuals() ** 2) / freedom)
    for _ in range(30):
        deviation = max(deviation, 1e-9)  # of points that lie on the law
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
    """What an interval is of: the log loss at a place, or a coefficient with the quantities' origin at a place."""

    place: np.ndarray
    """Logarithms of the quantities, [F], relative to the middle of the points."""
    coefficient: int | None = None
    """None for the log loss."""


def profile(targets: list[Target], problem: Problem, noise: Noise, allowed: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends (low [targets], high [targets]) at which the objective has grown by `allowed` units of t^2.

    Both ends of all targets are found together, each as a problem of its own.
    """
    both = [(target, sign) for target in targets for sign in (-1.0, 1.0)]
    held = _Held([target for target, _ in both], problem, noise)
    sign_B, limit = np.array([sign for _, sign in both]), allowed * noise.unit
    step_B = np.full(len(both), 0.5 * noise.deviation)
    inner_B, outer_B = np.zeros(len(both)), np.full(len(both), np.inf)
    ends_B = sign_B * np.inf
    while True:  # outwards, until the objective has grown too much
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
    """Problems with a target each, which is pulled away from the fit while all else is fitted."""

    def __init__(self, targets: list[Target], problem: Problem, noise: Noise):
        count, (n, num), size = len(targets), problem.x.shape, len(noise.theta_P)
        places = np.array([target.place for target in targets])
        is_loss = np.array([target.coefficient is None for target in targets])
        # A coefficient's problem has its origin at the place; a loss's has the place as one more point.
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
        """The targets of these rows pulled so far from the fit -> (whether the objective grows by more than `limit`,
        the values that the targets then have)."""
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
    """Coefficients [replicates, P] of fits to runs drawn with replacement, more different ones than coefficients."""
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
