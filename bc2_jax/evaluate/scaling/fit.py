"""Fits L = E + A / N^alpha + B / D^beta or L = a C^b + L_inf; predictions with intervals."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import fdtri, stdtrit

from bc2_jax.evaluate.scaling.huber import Problem, fit, log_loss
from bc2_jax.evaluate.scaling.intervals import Noise, Target, estimate_noise, profile, resample
from bc2_jax.validation import require, show

DELTA = 1e-3  # of Huber's loss of log residuals, as in replications of scaling laws
FEWEST_VALUES = 3  # distinct values of a quantity needed to determine its exponent


@dataclasses.dataclass(frozen=True)
class Law:
    """A law's form."""

    formula: str
    quantities: tuple[str, ...]
    factors: tuple[str, ...]
    floor: str
    exponents: tuple[str, ...]
    sign: int  # sign of the exponents as written: 1 for A / N^alpha, -1 for a C^b


SURFACE = Law("L = E + A / N^alpha + B / D^beta", ("N", "D"), ("A", "B"), "E", ("alpha", "beta"), 1)
COMPUTE = Law("L = a C^b + L_inf", ("C",), ("a",), "L_inf", ("b",), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law. Make it with `fit_surface` or `fit_compute`."""

    law: Law
    theta: np.ndarray  # c, e, s of `huber`, [P], with `middle` as the origin
    middle: np.ndarray  # mean logarithm of each quantity, [F]
    problem: Problem
    objective: float  # sum over runs of Huber's loss of log residuals
    replicates: int  # bootstrap replicates over runs
    seed: int

    @property
    def parameters(self) -> dict[str, float]:
        """By name in the formula, with quantities in their own units."""
        return {name: float(value) for name, value in zip(self.names, self._values(self.theta), strict=True)}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.law.factors, self.law.floor, *self.law.exponents)

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """The quantities of the runs, [n] each."""
        return tuple(np.exp(self.problem.x + self.middle).T)

    @property
    def losses(self) -> np.ndarray:
        """Of the runs, [n]."""
        return np.exp(self.problem.y)

    @property
    def residuals(self) -> np.ndarray:
        """Actual over fitted loss, minus 1, [n]."""
        return np.exp(self.problem.y - log_loss(self.theta[None], self.problem.x)[0]) - 1

    @property
    def noise(self) -> float:
        """Standard deviation of a run's relative loss about the law, outliers clipped; inf without more runs than
        parameters."""
        return self._noise.deviation if self.freedom > 0 else float("inf")

    @property
    def freedom(self) -> int:
        """Runs minus parameters."""
        return int(np.count_nonzero(self.problem.weights)) - len(self.theta)

    def predict(self, *at: ArrayLike) -> Any:
        """The loss at these quantities: (N, D) or (C,), each a number or an array of one shape, all positive."""
        x, shape = self._places(at)
        return _shaped(np.exp(log_loss(self.theta[None], x)[0]), shape)

    def interval(self, *at: ArrayLike | str, level: float = 0.95) -> Any:
        """(low, high) of the loss of one more run at these quantities, with its own noise, in their shape.

        With a parameter's name, the ends of that parameter; without arguments {name: ends} of all, which hold jointly.
        Raises ValueError for a level outside 0..1, an unknown name, and without more runs than parameters.
        """
        is_share = _is_number(level) and 0 < level < 1
        require(is_share, "level", level, "it must be a number between 0 and 1, for instance 0.95")
        if self.freedom < 1:
            raise ValueError(
                f"an interval of {self.law.formula} needs at least {len(self.theta) + 1} runs, one more than the law "
                f"has parameters; there are {len(self.theta) + self.freedom}."
            )
        if not at:
            return self._parameter_intervals(level)
        if len(at) == 1 and isinstance(at[0], str):
            legal = f"the parameters are {', '.join(self.names)}"
            require(at[0] in self.names, "parameter", at[0], legal)
            return self._parameter_intervals(level)[at[0]]
        x, shape = self._places(at)
        if not len(x):
            return np.empty(shape), np.empty(shape)
        t = float(stdtrit(self.freedom, 0.5 + level / 2))
        low, high = profile([Target(place) for place in x], self.problem, self._noise, t**2)
        sampled = log_loss(self._sample, x)
        ends = np.quantile(sampled, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
        centre, own = log_loss(self.theta[None], x)[0], t * self._noise.deviation
        low, high = np.minimum(low, centre), np.maximum(high, centre)
        low, high = centre - np.hypot(centre - low, own), centre + np.hypot(high - centre, own)
        return _shaped(np.exp(low), shape), _shaped(np.exp(high), shape)

    def without_largest(self) -> HeldOut | None:
        """The largest run (with equal ones), predicted from the others; None if too few others remain."""
        size = self.problem.x.sum(axis=1)
        is_largest = size >= size.max() - 1e-6
        kept = ~is_largest & (self.problem.weights > 0)
        try:
            rest = _fit(
                self.law, {name: v[kept] for name, v in zip(self.law.quantities, self.inputs, strict=True)},
                self.losses[kept], self.problem.weights[kept], float(self.problem.delta), self.replicates, self.seed,
            )  # fmt: skip
        except ValueError:
            return None
        if rest.freedom < 1:
            return None
        at = tuple(float(v[is_largest][0]) for v in self.inputs)
        return HeldOut(rest, at, float(np.exp(self.problem.y[is_largest].mean())))

    @functools.cached_property
    def _noise(self) -> Noise:
        return estimate_noise(self.theta, self.problem)

    @functools.cached_property
    def _sample(self) -> np.ndarray:
        return resample(self.theta, self.problem, self.replicates, self.seed)

    def _values(self, theta: np.ndarray) -> np.ndarray:
        """Coefficients [..., P] -> parameters in the order of `names`."""
        num = len(self.middle)
        c, e, s = theta[..., :num], theta[..., num : num + 1], theta[..., num + 1 :]
        return self._values_as_coefficients(np.concatenate([c + s * self.middle, e, s], axis=-1))

    def _parameter_intervals(self, level: float) -> dict[str, tuple[float, float]]:
        size = len(self.theta)
        allowed = size * float(fdtri(size, self.freedom, level))
        # Factors are for quantities in their own units: the origin is at 1.
        low, high = profile([Target(-self.middle, k) for k in range(size)], self.problem, self._noise, allowed)
        values = self._values_as_coefficients(np.vstack([low, high]))
        tail = (1 - level) / size / 2
        sampled = np.quantile(self._values(self._sample), [tail, 1 - tail], axis=0)
        ends = np.vstack([values, sampled, self._values(self.theta)])
        return {
            name: (float(low), float(high))
            for name, low, high in zip(self.names, ends.min(axis=0), ends.max(axis=0), strict=True)
        }

    def _values_as_coefficients(self, theta: np.ndarray) -> np.ndarray:
        """As `_values`, for coefficients with the origin at 1."""
        num = len(self.middle)
        with np.errstate(over="ignore"):  # the factor of a large exponent is inf
            return np.concatenate([np.exp(theta[..., : num + 1]), self.law.sign * theta[..., num + 1 :]], axis=-1)

    def _places(self, at: tuple[Any, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
        """[places, F] relative to the middle, and the shape of the given arrays."""
        names = self.law.quantities
        if len(at) != len(names):
            raise ValueError(f"{self.law.formula} is predicted at {', '.join(names)}: {len(at)} values were given.")
        given = [_numbers(name, value) for name, value in zip(names, at, strict=True)]
        try:
            arrays = np.broadcast_arrays(*given)
        except ValueError as error:
            shapes = " and ".join(str(array.shape) for array in given)
            raise ValueError(f"{' and '.join(names)} have the shapes {shapes}: they must have one shape.") from error
        x = np.stack([np.log(a).reshape(-1) for a in arrays], axis=1)
        return x - self.middle, arrays[0].shape


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The largest run, predicted from the others."""

    fit: Fit  # of the others
    at: tuple[float, ...]
    actual: float

    @property
    def predicted(self) -> float:
        return float(self.fit.predict(*self.at))

    @property
    def error(self) -> float:
        """As a share of the actual loss."""
        return self.predicted / self.actual - 1

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """95 % of runs."""
        return self.fit.interval(*self.at)


def fit_surface(
    N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, weights: ArrayLike | None = None, delta: float = DELTA,
    replicates: int = 300, seed: int = 0,
) -> Fit:  # fmt: skip
    """Fits L = E + A / N^alpha + B / D^beta to runs with N parameters, D tokens and `loss` in nats per token, [n] each.

    Minimises the weighted sum of Huber's loss (`delta`) of log residuals from a grid of starts. `replicates` and `seed`
    are for the bootstrap over runs. Raises ValueError for fewer runs than the 5 parameters, values that are not finite
    and positive, fewer than 3 distinct N or D, and N and D that are proportional in all runs.
    """
    return _fit(SURFACE, {"N": N, "D": D}, loss, weights, delta, replicates, seed)


def fit_compute(
    C: ArrayLike, loss: ArrayLike, *, weights: ArrayLike | None = None, delta: float = DELTA, replicates: int = 300,
    seed: int = 0,
) -> Fit:  # fmt: skip
    """Fits L = a C^b + L_inf to runs with C FLOPs; otherwise as `fit_surface`."""
    return _fit(COMPUTE, {"C": C}, loss, weights, delta, replicates, seed)


def _fit(
    law: Law, quantities: Mapping[str, ArrayLike], loss: ArrayLike, weights: ArrayLike | None, delta: float,
    replicates: int, seed: int,
) -> Fit:  # fmt: skip
    arrays = {name: _numbers(name, value) for name, value in (*quantities.items(), ("loss", loss))}
    count, size = arrays["loss"].size, 2 * len(quantities) + 1
    for name, values in arrays.items():
        require(values.ndim == 1, f"the shape of {name}", values.shape, "it must have one dimension, the runs")
        require(values.size == count, f"the length of {name}", values.size, f"there are {count} losses")
    is_right = _is_number(delta) and 0 < delta < np.inf
    require(is_right, "delta", delta, "it must be a number, finite and positive")
    for name, value, least in (("replicates", replicates, 1), ("seed", seed, 0)):
        is_right = isinstance(value, numbers.Integral) and value >= least
        require(is_right, name, value, f"it must be a whole number, at least {least}")
    shares = np.ones(count) if weights is None else _floats("weights", weights)
    is_right = shares.shape == (count,) and bool(np.all(np.isfinite(shares) & (shares >= 0)))
    require(is_right, "weights", weights, f"they must be {count} finite numbers, at least 0")
    used = shares > 0
    legal = f"{law.formula} has {size} parameters and needs at least as many"
    require(used.sum() >= size, "the number of runs", int(used.sum()), legal)
    x = np.stack([np.log(arrays[name]) for name in quantities], axis=1)
    for name, column in zip(quantities, x[used].T, strict=True):
        different = len(np.unique(np.round(column, 6)))
        legal = f"the exponent of {name} needs at least {FEWEST_VALUES}"
        if law is SURFACE:
            legal += "; where N or D is the same in all runs, fit_compute fits the loss to their compute"
        require(different >= FEWEST_VALUES, f"the number of different {name}", different, legal)
    middle = np.average(x, axis=0, weights=shares)
    if law is SURFACE and np.linalg.svd(x[used] - middle, compute_uv=False)[-1] < 1e-2:
        raise ValueError(
            "N and D are not valid: they go up together in all runs, which does not tell their exponents apart; "
            "fit_compute fits the loss to their compute."
        )
    problem = Problem(x - middle, np.log(arrays["loss"]), shares, delta)
    theta, objective = fit(problem)
    return Fit(law, theta, middle, problem, objective, replicates, seed)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _floats(name: str, values: ArrayLike) -> np.ndarray:
    """As float64. Raises ValueError for what is not numbers."""
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} = {show(values)} is not valid: it must be numbers.") from error


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    """As float64. Raises ValueError, naming the first that is not finite and positive."""
    array = _floats(name, values)
    wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if wrong.size:
        index = int(wrong[0])
        place = name if array.ndim == 0 else f"{name}[{index}]"
        require(False, place, float(array.reshape(-1)[index]), "it must be finite and positive")
    return array


def _shaped(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | float:
    return values.reshape(shape) if shape else float(values[0])
