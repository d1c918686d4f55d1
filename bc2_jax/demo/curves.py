"""Draws a metric of several runs as curves in one picture; a program of `bc2 paper`.

python -m bc2_jax.demo.curves PICTURE --metric NAME RUN=LABEL... [--top VALUE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.train.metrics import read_metrics
from bc2_jax.train.pictures import add_grid_and_legend, picture

SMOOTHING = 10
"""Steps over which a curve is averaged: a batch of a small run is noisy."""
_LABELS = {"cross_entropy": "training loss, nats a token", "max_logit": "mean largest logit"}


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and the SMOOTHING - 1 before it."""
    parts = [values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def draw_curves(path: Path, metric: str, runs: Sequence[tuple[str, str]], top: float | None = None) -> None:
    """Writes the picture; `runs` are (folder, label). Raises ValueError for a run that does not have the metric."""
    with picture(path, figsize=(7, 4)) as axes:
        for folder, label in runs:
            points = [(m["step"], m[metric]) for m in read_metrics(Path(folder) / "metrics.jsonl") if metric in m]
            if not points:
                raise ValueError(f"{folder} has no metric {metric!r}.")
            steps, values = zip(*points, strict=True)
            axes.plot(steps, smoothed(values), label=label, linewidth=1.2)
        axes.set(xlabel="step", ylabel=f"{_LABELS.get(metric, metric)} (mean of {SMOOTHING} steps)")
        if top is not None:
            axes.set_ylim(top=top)
        add_grid_and_legend(axes, fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--top", type=float, help="the largest value shown")
    parser.add_argument("runs", nargs="+", metavar="RUN=LABEL")
    args = parser.parse_args()
    draw_curves(args.picture, args.metric, [tuple(run.split("=", 1)) for run in args.runs], args.top)


if __name__ == "__main__":
    main()
