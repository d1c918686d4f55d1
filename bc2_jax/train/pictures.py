"""Pictures of metrics, drawn with matplotlib."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.files import replaced


@contextlib.contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, **settings: Any) -> Iterator[Any]:
    """Yields the axes of `pyplot.subplots`; afterwards writes the picture to `path` atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, **settings)
    try:
        yield axes
        figure.tight_layout()
        with replaced(path) as partial:
            figure.savefig(partial, dpi=110, format=path.suffix.removeprefix(".") or "png")
    finally:
        pyplot.close(figure)


def plot_metric(
    axes: Any, metrics: Sequence[Mapping[str, Any]], name: str, label: str | None, factor: float = 1, **style: Any
) -> None:
    """Draws the metric `name` by step, times `factor`; nothing if no step has it.

    `style` is passed to `Axes.plot`; `dots_below` marks each point if there are fewer points than this.
    """
    points = [(m["step"], factor * m[name]) for m in metrics if m.get(name) is not None]
    if len(points) < style.pop("dots_below", 0):
        style["marker"] = "o"
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def add_grid_and_legend(axes: Any, **style: Any) -> None:
    """Adds a grid, and a legend if anything has a label."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**style)
