"""What a ladder says: predictions first, then how far they can be trusted, then the parameters."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bc2_jax.evaluate.scaling.collection import Point, Points, column
from bc2_jax.evaluate.scaling.fit import DELTA, Fit, HeldOut, fit_compute, fit_surface
from bc2_jax.files import replaced
from bc2_jax.terminal import make_table
from bc2_jax.validation import require

LEVELS = (0.8, 0.95)
FAR = 10.0
"""Times the largest run's compute from which a prediction is called far."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one model."""

    name: str
    N: float
    D: float
    C: float
    loss: float
    intervals: tuple[tuple[float, float], ...] | None
    """(low, high) of a run's loss at each of LEVELS; None unless there are more runs than parameters."""
    actual: float | None = None

    @property
    def error(self) -> float | None:
        """Predicted over actual loss, minus 1."""
        return None if self.actual is None else self.loss / self.actual - 1

    @property
    def verdict(self) -> str:
        """Where the actual loss lies."""
        if self.actual is None or self.intervals is None:
            return ""
        for level, (low, high) in zip(LEVELS, self.intervals, strict=True):
            if low <= self.actual <= high:
                return f"within {level:.0%}"
        return f"OUTSIDE {LEVELS[-1]:.0%}"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A fit with all that is said of it."""

    points: Points
    fit: Fit
    held_out: HeldOut | None
    predictions: tuple[Prediction, ...]
    parameter_ends: dict[str, tuple[float, float]] | None
    """95 %; None as in `Prediction`."""
    warnings: tuple[str, ...]


def choose_law(points: Sequence[Point], law: str = "auto") -> str:
    """compute or surface; auto takes the surface where N and D are known and each differs of itself.

    Raises ValueError for another name.
    """
    require(law in ("auto", "compute", "surface"), "law", law, "legal values are auto, compute, surface")
    if law != "auto":
        return law
    try:
        fit = fit_surface(column(points, "N"), column(points, "D"), column(points, "loss"), replicates=1)
    except ValueError:
        return "compute"
    return "surface" if fit.freedom >= 1 else "compute"


def analyse(points: Points, targets: Sequence[Point] = (), law: str = "auto", delta: float = DELTA) -> Analysis:
    """Fits the law, and predicts the targets, whose loss is nan where it is not known.

    Raises ValueError as `fit_compute` and `fit_surface`.
    """
    known = points.points
    if choose_law(known, law) == "surface":
        is_known = not any(math.isnan(point.N) for point in known)
        require(is_known, "law", law, "a surface needs N and D of the runs, and only their C is known")
        fit = fit_surface(column(known, "N"), column(known, "D"), column(known, "loss"), delta=delta)
    else:
        fit = fit_compute(column(known, "C"), column(known, "loss"), delta=delta)
    predictions = tuple(_predict(fit, targets))
    ends = fit.interval() if fit.freedom >= 1 else None
    warnings = (*points.warnings, *_doubts(fit, predictions))
    return Analysis(points, fit, fit.without_largest(), predictions, ends, warnings)


def place(fit: Fit, point: Point) -> tuple[float, ...]:
    """Where the fit is asked about a point."""
    return tuple(getattr(point, name) for name in fit.law.quantities)


def _predict(fit: Fit, targets: Sequence[Point]) -> list[Prediction]:
    if not targets:
        return []
    at = [column(targets, name) for name in fit.law.quantities]
    ends = [[] if fit.freedom < 1 else list(zip(*fit.interval(*at, level=level), strict=True)) for level in LEVELS]
    return [
        Prediction(
            target.name, target.N, target.D, target.C, float(loss),
            tuple((float(low), float(high)) for low, high in (level[index] for level in ends)) if ends[0] else None,
            None if math.isnan(target.loss) else target.loss,
        )
        for index, (target, loss) in enumerate(zip(targets, fit.predict(*at), strict=True))
    ]  # fmt: skip


def _doubts(fit: Fit, predictions: Sequence[Prediction]) -> list[str]:
    """What the reader must know of this fit."""
    doubts = []
    largest = max((float(np.prod(row)) for row in zip(*fit.inputs, strict=True)), default=0.0)
    for p in predictions:
        times = math.prod(getattr(p, name) for name in fit.law.quantities) / largest
        if times > FAR:
            doubts.append(
                f"{p.name} has {times:,.0f} times the compute of the largest run: what is predicted holds only if the "
                "law holds that far, which no smaller run can show."
            )
    if fit.freedom < 1:
        doubts.append("There are as many runs as parameters: the law meets all of them whatever it is worth.")
    parameters = fit.parameters
    if any(fit.law.sign * parameters[name] <= 0 for name in fit.law.exponents):
        doubts.append("An exponent has the wrong sign: the loss does not fall with more of it in these runs.")
    return doubts


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Predictions, the largest run from the others, runs and residuals, parameters."""
    fit, per_nat = analysis.fit, analysis.points.bits_per_byte
    for warning in analysis.warnings:
        console.print(f"warning: {warning}")
    if analysis.predictions:
        _print_predictions(console, analysis, f"Predicted from {len(fit.losses)} runs by {fit.law.formula}")
    if (held := analysis.held_out) is not None:
        low, high = held.interval
        is_in = "within" if low <= held.actual <= high else "OUTSIDE"
        console.print(
            f"Leaving out the largest run, the others predict {held.predicted:.5f} for it, 95 % {low:.5f} to "
            f"{high:.5f}; it has {held.actual:.5f}, {held.error:+.2%} off, {is_in} the interval."
        )
    else:
        console.print("There are too few runs to leave out the largest and predict it from the others.")
    headers = ["run", *fit.law.quantities, "loss"] + ["bits a byte"] * (per_nat is not None) + ["fitted", "residual"]
    table = make_table(*headers, title="Runs, nats a token", numbers_from=1)
    for point, residual in zip(analysis.points.points, fit.residuals, strict=True):
        bits = [f"{point.loss * per_nat:.5f}"] if per_nat is not None else []
        fitted = float(fit.predict(*place(fit, point)))
        numbers = [f"{getattr(point, name):.5g}" for name in fit.law.quantities]
        table.add_row(point.name, *numbers, f"{point.loss:.5f}", *bits, f"{fitted:.5f}", f"{residual:+.3%}")
    console.print(table)
    _print_parameters(console, fit, analysis.parameter_ends or {})


def _print_predictions(console: Console, analysis: Analysis, title: str) -> None:
    fit, per_nat = analysis.fit, analysis.points.bits_per_byte
    headers = ["model", *fit.law.quantities, "loss", *(f"{level:.0%}" for level in LEVELS)]
    headers += ["bits a byte"] * (per_nat is not None)
    has_actual = any(p.actual is not None for p in analysis.predictions)
    table = make_table(*headers, *(["actual", "error", ""] if has_actual else []), title=title, numbers_from=1)
    for p in analysis.predictions:
        cells = [p.name, *(f"{getattr(p, name):.5g}" for name in fit.law.quantities), f"{p.loss:.5f}"]
        cells += ["not known"] * 2 if p.intervals is None else [f"{low:.5f} to {high:.5f}" for low, high in p.intervals]
        cells += [f"{p.loss * per_nat:.5f}"] if per_nat is not None else []
        if has_actual:
            cells += ["", "", ""] if p.error is None else [f"{p.actual:.5f}", f"{p.error:+.2%}", p.verdict]
        table.add_row(*cells)
    console.print(table)


def _print_parameters(console: Console, fit: Fit, ends: dict[str, tuple[float, float]]) -> None:
    title = (
        f"{fit.law.formula}; objective {fit.objective:.7g} (sum of Huber's loss, delta {float(fit.problem.delta):g})"
    )
    table = make_table("parameter", "value", "95 %, all at one time", title=title, numbers_from=1)
    for name, value in fit.parameters.items():
        table.add_row(name, f"{value:.7g}", "{:.5g} to {:.5g}".format(*ends[name]) if ends else "not known")
    console.print(table)
    if ends:
        console.print(
            f"Noise of a run about the law: {fit.noise:.3%}. Few runs hardly determine the parameters, which can "
            "make up for each other; what they predict is far better known."
        )


def save_analysis(analysis: Analysis, out: Path) -> None:
    """Writes OUT/scaling.json and OUT/scaling.png. In the JSON null stands for what is not known or not finite."""
    from bc2_jax.evaluate.scaling.picture import draw

    out.mkdir(parents=True, exist_ok=True)
    fit, held = analysis.fit, analysis.held_out
    record = {
        "law": fit.law.formula, "runs": [dataclasses.asdict(point) for point in analysis.points.points],
        "predictions": [
            {k: v for k, v in dataclasses.asdict(p).items() if k != "intervals"}
            | {"error": p.error, "intervals": p.intervals and dict(zip(map(str, LEVELS), p.intervals, strict=True))}
            for p in analysis.predictions
        ],
        "largest_left_out": held and {
            "predicted": held.predicted, "actual": held.actual, "error": held.error,
            "interval_95": held.interval,
        },
        "parameters": fit.parameters, "parameters_95": analysis.parameter_ends,
        "objective": fit.objective, "delta": float(fit.problem.delta), "noise": fit.noise if fit.freedom >= 1 else None,
        "bits_per_byte_of_a_nat": analysis.points.bits_per_byte, "warnings": list(analysis.warnings),
    }  # fmt: skip
    with replaced(out / "scaling.json") as partial:
        partial.write_text(json.dumps(_finite(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(analysis, out / "scaling.png")


def _finite(value: Any) -> Any:
    """With None for nan and inf, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
