"""A ladder as a picture: points, the law and its bands, predictions; the residuals below."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bc2_jax.evaluate.scaling.report import Analysis

_PLACES = 25
_COLOUR = "#1f77b4"


def draw(analysis: Analysis, path: Path) -> None:
    """Writes a PNG: loss by compute, both logarithmic."""
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
    """(compute, where the fit is asked) of each line: one by compute, or one for each of a few sizes by tokens."""
    fit = analysis.fit
    ends = [*(p.C for p in analysis.points.points), *(p.C for p in analysis.predictions)]
    if len(fit.law.quantities) == 1:
        C = np.geomspace(min(ends), max(ends), _PLACES)
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
    """2.5 instead of 2.5 x 10^0, at values that are read without thinking."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = axes.get_ylim()
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 1e9) if (high - low) / s <= 12)
    axes.yaxis.set_major_locator(FixedLocator((np.arange(np.ceil(low / step), high / step + 1) * step).tolist()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2f}"))
    axes.set_ylim(low, high)
