"""Fits power laws with a floor by Huber's loss on logarithms, many problems in parallel.

A law of F quantities x_1 .. x_F (logarithms) has 2F + 1 coefficients: log L = log(sum_k exp(c_k - s_k x_k) + exp(e)).
The objective is the sum, not the mean, of Huber's loss of log L - log(loss), as a mean would be below the tolerance of
minimisers. It is minimised by Newton's method with exact second derivatives from a grid of starts. Problems (starts or
bootstrap replicates) are the leading axis of every array.

Letters: B problems, n points, F quantities, P = 2F + 1 coefficients (c_1 .. c_F, e, s_1 .. s_F).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

ITERATIONS = 300
LONGEST_STEP = 2.0  # of one iteration, in units of the coefficients; prevents divergence without a floor
EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.9)  # exponents in the grid of starts
FLOORS = (0.1, 0.5, 0.8, 0.95)
"""Shares of the floor in the loss at the middle of the points, in the grid of starts."""
LEAST_SHARE = 0.01  # share of the loss below which `minimise_again` lifts a term
SPLITS = (0.15, 0.5, 0.85)  # shares of the first term above the floor


class Problem(NamedTuple):
    """The data to fit."""

    x: np.ndarray  # logarithms of the quantities, [n, F], or [B, n, F]
    y: np.ndarray  # logarithms of the losses, [n] or [B, n]
    weights: np.ndarray  # [n] or [B, n]
    delta: float | np.ndarray  # where Huber's loss becomes linear; a number or [n]


def log_loss(theta_BP: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Log loss [B, n] of coefficients [B, P] at log quantities [n, F] or [B, n, F]."""
    return np.logaddexp.reduce(_terms(theta_BP, x), axis=-1)


def _terms(theta_BP: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[B, n, F + 1], the floor last."""
    num = x.shape[-1]
    c_BF, e_B, s_BF = theta_BP[:, :num], theta_BP[:, num], theta_BP[:, num + 1 :]
    t = c_BF[:, None] - s_BF[:, None] * x
    return np.concatenate([t, np.broadcast_to(e_B[:, None, None], (*t.shape[:2], 1))], axis=-1)


def huber(residuals: np.ndarray, delta: float | np.ndarray) -> np.ndarray:
    """r^2 / 2 up to delta, then delta (|r| - delta / 2)."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def objective(theta_BP: np.ndarray, problem: Problem) -> np.ndarray:
    """[B]: the weighted sum over the points."""
    residuals = log_loss(theta_BP, problem.x) - problem.y
    return np.sum(problem.weights * huber(residuals, problem.delta), axis=-1)


def _derivatives(theta_BP: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Gradient [B, P] and Hessian [B, P, P] of the objective."""
    x, num = problem.x, problem.x.shape[-1]
    t = _terms(theta_BP, x)
    f = np.logaddexp.reduce(t, axis=-1)
    p = np.exp(t - f[..., None])  # shares of the terms
    residuals = f - problem.y
    slope = problem.weights * np.clip(residuals, -problem.delta, problem.delta)
    curvature = problem.weights * (np.abs(residuals) <= problem.delta)
    g = np.concatenate([p, -p[..., :num] * x], axis=-1)  # gradient of f
    gradient = np.einsum("bn,bnp->bp", slope, g)
    hessian = np.swapaxes(g * (curvature - slope)[..., None], 1, 2) @ g
    m = slope[..., None] * p
    for k in range(num):  # second derivatives inside a term
        i, j = k, num + 1 + k
        cross = np.sum(m[..., k] * x[..., k], axis=-1)
        hessian[:, i, i] += np.sum(m[..., k], axis=-1)
        hessian[:, i, j] -= cross
        hessian[:, j, i] -= cross
        hessian[:, j, j] += np.sum(m[..., k] * x[..., k] ** 2, axis=-1)
    hessian[:, num, num] += np.sum(m[..., num], axis=-1)
    return gradient, hessian


def minimise(
    theta_BP: np.ndarray,
    problem: Problem,
    iterations: int = ITERATIONS,
    fixed_BP: np.ndarray | None = None,
    tolerance: float = 1e-14,
) -> tuple[np.ndarray, np.ndarray]:
    """Damped Newton from coefficients [B, P] to a local minimum -> (coefficients [B, P], objective [B]).

    `fixed_BP` coefficients are constant. A problem is done when an almost undamped step gains at most the share
    `tolerance` of the objective. Steps that do not descend are repeated with more damping; along negative curvature
    steps go downhill.
    """
    count, (n, num) = len(theta_BP), problem.x.shape[-2:]
    full = Problem(
        np.broadcast_to(problem.x, (count, n, num)), np.broadcast_to(problem.y, (count, n)),
        np.broadcast_to(problem.weights, (count, n)), problem.delta,
    )  # fmt: skip
    free_BP = np.ones(theta_BP.shape) if fixed_BP is None else 1.0 - fixed_BP
    theta_BP, value_B = theta_BP.copy(), objective(theta_BP, full)
    damping_B, todo = np.full(count, 1e-2), np.arange(count)
    for _ in range(iterations):
        part = full._replace(x=full.x[todo], y=full.y[todo], weights=full.weights[todo])
        gradient, hessian = _derivatives(theta_BP[todo], part)
        gradient, free = gradient * free_BP[todo], free_BP[todo]
        hessian *= free[:, :, None] * free[:, None, :]
        eigenvalues, vectors = np.linalg.eigh(hessian)
        sizes = np.abs(eigenvalues)
        largest = np.maximum(sizes.max(axis=-1, keepdims=True), 1e-300)
        along = np.einsum("bpq,bp->bq", vectors, gradient) / (sizes + (damping_B[todo, None] + 1e-14) * largest)
        step = -np.einsum("bpq,bq->bp", vectors, along)
        with np.errstate(over="ignore"):  # without curvature; such a step is damped
            length = np.linalg.norm(step, axis=-1, keepdims=True)
        step *= np.minimum(1.0, LONGEST_STEP / np.maximum(length, 1e-300))
        new = objective(theta_BP[todo] + step, part)
        better = new < value_B[todo]
        gain = np.where(better, value_B[todo] - new, 0.0)
        theta_BP[todo[better]] += step[better]
        is_done = (damping_B[todo] > 1e12) | (better & (gain <= tolerance * new) & (damping_B[todo] < 1e-4))
        value_B[todo[better]] = new[better]
        damping_B[todo] *= np.where(better, 0.1, 6.0)
        damping_B[todo] = np.maximum(damping_B[todo], 1e-14)
        todo = todo[~is_done]
        if not len(todo):
            break
    return theta_BP, value_B


def minimise_again(
    theta_BP: np.ndarray, problem: Problem, iterations: int = ITERATIONS, fixed_BP: np.ndarray | None = None,
    tolerance: float = 1e-14,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """As `minimise`, from the minimum of a similar problem, in which a term may have vanished.

    A vanished term has zero derivatives, so each problem is also started with negligible terms lifted; the better
    result counts.
    """
    count, num = len(theta_BP), problem.x.shape[-1]
    x_BF, s_BF = np.median(problem.x, axis=-2), theta_BP[:, num + 1 :]
    least_B1 = (np.zeros(count) + np.median(problem.y, axis=-1))[:, None] + np.log(LEAST_SHARE)
    c_BF = np.maximum(theta_BP[:, :num] - s_BF * x_BF, least_B1) + s_BF * x_BF
    lifted_BP = np.concatenate([c_BF, np.maximum(theta_BP[:, num : num + 1], least_B1), s_BF], axis=1)
    if fixed_BP is not None:
        lifted_BP = np.where(fixed_BP, theta_BP, lifted_BP)
    x, y, weights = (
        np.concatenate([part] * 2) if part.ndim == own else part
        for part, own in ((problem.x, 3), (problem.y, 2), (problem.weights, 2))
    )
    twice = Problem(x, y, weights, problem.delta)
    fixed = None if fixed_BP is None else np.concatenate([fixed_BP] * 2)
    theta, value = minimise(np.concatenate([theta_BP, lifted_BP]), twice, iterations, fixed, tolerance)
    rows = np.arange(count) + count * (value[count:] < value[:count])
    return theta[rows], value[rows]


def starts(problem: Problem) -> np.ndarray:
    """A grid of coefficients [B, P] with the mean loss at the middle of the points, where x must be zero."""
    num, middle = problem.x.shape[1], float(np.mean(problem.y))
    spread = np.maximum(problem.x.std(axis=0), 1e-300)
    grid = []
    for floor, slopes in itertools.product(FLOORS, itertools.product(EXPONENTS, repeat=num)):
        for split in SPLITS if num == 2 else (1.0,):
            shares = [(1 - floor) * split, (1 - floor) * (1 - split)][:num]
            # E[exp(-s x)] > 1: subtract half of the variance of s x
            c = [
                middle + np.log(share) - 0.5 * (s * w) ** 2 for share, s, w in zip(shares, slopes, spread, strict=True)
            ]
            grid.append([*c, middle + np.log(floor), *slopes])
    return np.array(grid)


def fit(problem: Problem) -> tuple[np.ndarray, float]:
    """The best of all starts: (coefficients [P], objective)."""
    theta, value = minimise(starts(problem), problem, 25)
    best = np.argsort(value)[:24]
    theta, value = minimise(theta[best], problem)
    winner = int(np.argmin(value))
    return theta[winner], float(value[winner])
