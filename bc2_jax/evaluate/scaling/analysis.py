"""Analysis of a ladder: predictions, warnings, the fitted parameters; as tables, JSON and plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bc2_jax.evaluate.records import finite, write_json
from bc2_jax.evaluate.scaling.collection import Point, Points, column
from bc2_jax.evaluate.scaling.fit import DELTA, Fit, HeldOut, fit_compute, fit_surface
from bc2_jax.terminal import make_table
from bc2_jax.validation import require

LEVELS = (0.8, 0.95)
_POINTS = 25  # of a plotted curve
_COLOUR = "#1f77b4"
FAR = 10.0  # multiple of the largest run's compute from which a prediction is warned of


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted loss of one model."""

    name: str
    N: float
    D: float
    C: float
    loss: float
    intervals: tuple[tuple[float, float], ...] | None
    """(low, high) of a run's loss at each of LEVELS; None without more runs than parameters."""
    actual: float | None = None

    @property
    def error(self) -> float | None:
        """Predicted over actual loss, minus 1."""
        return None if self.actual is None else self.loss / self.actual - 1

    @property
    def verdict(self) -> str:
        """In which interval the actual loss lies."""
        if self.actual is None or self.intervals is None:
            return ""
        for level, (low, high) in zip(LEVELS, self.intervals, strict=True):
            if low <= self.actual <= high:
                return f"within {level:.0%}"
        return f"OUTSIDE {LEVELS[-1]:.0%}"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A fit with its predictions and warnings."""

    points: Points
    fit: Fit
    held_out: HeldOut | None
    predictions: tuple[Prediction, ...]
    parameter_ends: dict[str, tuple[float, float]] | None  # 95 %; None as in `Prediction`
    warnings: tuple[str, ...]


def choose_law(points: Sequence[Point], law: str = "auto") -> str:
    """ "compute" or "surface"; "auto" takes the surface if N and D are known and vary independently.

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
    """Fits the law and predicts the targets, whose loss is nan if unknown. Raises ValueError as the fits do."""
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
    """A point's quantities, as arguments of `Fit.predict`."""
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
    """Warnings of this fit."""
    doubts = []
    largest = max((float(np.prod(row)) for row in zip(*fit.inputs, strict=True)), default=0.0)
    for p in predictions:
        times = math.prod(getattr(p, name) for name in fit.law.quantities) / largest
        if times > FAR:
            doubts.append(
                f"{p.name} has {times:,.0f} times the compute of the largest run: the prediction holds only if the law "
                "does that far, which smaller runs cannot show."
            )
    if fit.freedom < 1:
        doubts.append("There are as many runs as parameters: the law fits all of them exactly.")
    parameters = fit.parameters
    if any(fit.law.sign * parameters[name] <= 0 for name in fit.law.exponents):
        doubts.append("An exponent has the wrong sign: in these runs the loss does not fall with it.")
    return doubts


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Prints warnings, predictions, the largest run predicted from the others, residuals and parameters."""
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
            f"Noise of a run about the law: {fit.noise:.3%}. With few runs parameters compensate each other and are "
            "poorly determined; predictions are far better determined."
        )


def save_analysis(analysis: Analysis, out: Path) -> None:
    """Writes OUT/scaling.json (null if unknown or not finite) and OUT/scaling.png."""
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
    write_json(out / "scaling.json", finite(record))
    draw_analysis(analysis, out / "scaling.png")


def draw_analysis(analysis: Analysis, path: Path) -> None:
    """Writes a PNG: loss by compute (log-log), the law with its bands, predictions, residuals below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fit = analysis.fit
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 7), sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )  # fmt: skip
    points, predictions = analysis.points.points, analysis.predictions
    computes = [point.C for point in points]
    lines = _lines(analysis)
    for index, (C, at) in enumerate(lines):
        above.plot(C, fit.predict(*at), color=_COLOUR, linewidth=1, label=fit.law.formula if not index else None)
        if fit.freedom >= 1:
            for level, alpha in ((0.95, 0.15), (0.8, 0.25)):
                low, high = fit.interval(*at, level=level)
                label = f"{level:.0%} of runs" if not index else None
                above.fill_between(C, low, high, color=_COLOUR, alpha=alpha, linewidth=0, label=label)
    above.scatter(computes, [point.loss for point in points], color="black", s=16, zorder=3, label="runs")
    for p in predictions:
        error = None
        if p.intervals is not None:
            low, high = p.intervals[-1]
            error = [[max(p.loss - low, 0)], [max(high - p.loss, 0)]]
        above.errorbar([p.C], [p.loss], yerr=error, fmt="D", color="#d62728", markersize=5, capsize=3)
        above.annotate(
            f"{p.name} {p.loss:.3f}", (p.C, p.loss), textcoords="offset points", xytext=(-10, -16), ha="right"
        )
        if p.actual is not None:
            above.scatter([p.C], [p.actual], marker="x", color="black", s=45, zorder=4)
            below.scatter([p.C], [100 * (p.actual / p.loss - 1)], marker="x", color="black", s=45)
    if predictions:
        above.scatter([], [], marker="D", color="#d62728", label="predicted, 95 %")
    if any(p.actual is not None for p in predictions):
        above.scatter([], [], marker="x", color="black", label="actual")
    above.set(xscale="log", yscale="log", ylabel="loss on held-out text (nats a token)")
    _plain_ticks(above)
    above.legend()
    below.axhline(0, color=_COLOUR, linewidth=1)
    below.scatter(computes, 100 * fit.residuals, color="black", s=16)
    below.set(xlabel="compute C (FLOPs: layers, head and attention)", ylabel="residual (%)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(analysis: Analysis) -> list[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
    """(compute, arguments of `Fit.predict`) of each curve: one by compute, or one by tokens for each of a few sizes."""
    fit = analysis.fit
    ends = [*(p.C for p in analysis.points.points), *(p.C for p in analysis.predictions)]
    if len(fit.law.quantities) == 1:
        C = np.geomspace(min(ends), max(ends), _POINTS)
        return [(C, (C,))]
    N, D = fit.inputs
    C_of = np.array([point.C for point in analysis.points.points])
    sizes = np.unique(np.round(N, 0))
    lines: list[tuple[np.ndarray, tuple[np.ndarray, ...]]] = []
    for size in sizes[np.linspace(0, len(sizes) - 1, min(len(sizes), 5)).astype(int)]:
        mine = np.abs(N / size - 1) < 1e-6
        if np.count_nonzero(mine) > 1:
            tokens = np.geomspace(D[mine].min(), D[mine].max(), 9)
            per_token = float(np.mean(C_of[mine] / D[mine]))
            lines.append((per_token * tokens, (np.full(len(tokens), size), tokens)))
    return lines


def _plain_ticks(axes: Any) -> None:
    """Ticks such as 2.5 instead of 2.5 x 10^0, at round values."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = axes.get_ylim()
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 1e9) if (high - low) / s <= 12)
    axes.yaxis.set_major_locator(FixedLocator((np.arange(np.ceil(low / step), high / step + 1) * step).tolist()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
    axes.set_ylim(low, high)
