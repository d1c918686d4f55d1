"""The results of a run's checkpoints as a curve (figure 7 of the paper): choice of checkpoints, table, plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bc2_jax.evaluate.asking import Questions
from bc2_jax.evaluate.evaluation import read_results
from bc2_jax.evaluate.identity import Model, read_identity, require_same_asking
from bc2_jax.evaluate.results import Results, show_metric
from bc2_jax.files import replaced
from bc2_jax.terminal import make_table
from bc2_jax.train.milestones import Milestone, list_milestones
from bc2_jax.validation import choices, require

FOLDER = "step_{}"
_UNITS = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (1, ""))


class Point(NamedTuple):
    """The results of one checkpoint."""

    step: int
    tokens: int  # trained on; 0 if the run does not count tokens
    tasks: dict[str, Results]


def choose_checkpoints(run: Path, which: str) -> list[Milestone]:
    """The checkpoints of a run, oldest first; `which` is "all" (complete ones), "permanent", or steps ("1000,2000").

    Raises ValueError for another `which`, a step without a checkpoint and a damaged one, FileNotFoundError for a folder
    without checkpoints.
    """
    milestones = list_milestones(run)
    if which in ("all", "permanent"):
        chosen = [m for m in milestones if m.problem is None and (which == "all" or m.permanent)]
        legal = "the run has none: checkpoint.keep_every_tokens keeps some permanently"
        require(bool(chosen), "--checkpoints", which, legal if which == "permanent" else "none of them is whole")
        return chosen
    legal = "it must be all, permanent, or steps such as 1000,2000"
    require(re.fullmatch(r"\d+(,\d+)*", which) is not None, "--checkpoints", which, legal)
    found = {milestone.step: milestone for milestone in milestones}
    chosen = []
    for step in sorted({int(text) for text in which.split(",")}):
        require(step in found, "--checkpoints", which, f"{run} has checkpoints of {choices(found)}")
        if (problem := found[step].problem) is not None:
            raise ValueError(problem)
        chosen.append(found[step])
    return chosen


def read_points(out: Path) -> list[Point]:
    """All checkpoints with results in OUT, oldest first."""
    points = []
    for folder in out.glob(FOLDER.format("*")):
        about = read_identity(folder)
        if about is not None and isinstance(about.get("step"), int) and (tasks := read_results(folder)):
            points.append(Point(about["step"], about.get("tokens") or 0, tasks))
    return sorted(points, key=lambda point: point.step)


def check_points(out: Path, first: Model, asked: Sequence[Questions]) -> None:
    """Raises ValueError if OUT has checkpoints of another run than `first`'s, or with other settings or prompts."""
    about = first.describe()
    for folder in sorted(out.glob(FOLDER.format("*"))):
        if (before := read_identity(folder)) is None:
            continue
        if Path(before["model"]).parent != Path(about["model"]).parent:
            run = Path(before["model"]).parent
            raise ValueError(
                f"{folder} is of a checkpoint in {run}, not in {Path(about['model']).parent}: of another run or of one "
                "that was moved; choose another --out."
            )
        require_same_asking(folder, before, about, asked)


def names_of(points: Sequence[Point]) -> list[str]:
    """The benchmarks with a figure at any point."""
    return list(dict.fromkeys(name for point in points for name, one in point.tasks.items() if one["headline"]))


def print_curve(console: Console, points: Sequence[Point]) -> None:
    """One line per checkpoint."""
    names = names_of(points)
    table = make_table("step", "tokens", *names, title="Checkpoints, ± one standard error", numbers_from=0)
    for point in points:
        cells = (show_metric(_metric(point, name)) for name in names)
        table.add_row(f"{point.step:,}", f"{point.tokens:,}" if point.tokens else "-", *cells)
    console.print(table)
    for line in find_breaks(points):
        console.print(line)


def find_breaks(points: Sequence[Point]) -> list[str]:
    """A sentence for each benchmark whose points have different items or metrics, and so are not one curve."""
    lines = []
    for name in names_of(points):
        kinds: dict[str, list[str]] = {}
        for point in points:
            if name in point.tasks:
                results = point.tasks[name]
                kinds.setdefault(f"{results['headline']} of {results['items']:,} items", []).append(str(point.step))
        if len(kinds) > 1:
            parts = "; ".join(f"{kind} at step {choices(steps)}" for kind, steps in kinds.items())
            lines.append(f"{name}: the points differ in more than the checkpoint ({parts}); evaluate all alike.")
    return lines


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Step, tokens, and each benchmark's leading metric."""
    return [
        {"step": p.step, "tokens": p.tokens}
        | {name: {"metric": one["headline"], **(_metric(p, name) or {})} for name, one in p.tasks.items()}
        for p in points
    ]


def plot_curve(path: Path, points: Sequence[Point]) -> None:
    """Plots each benchmark by tokens, or by steps if tokens are not counted; bars are one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    what = "tokens" if all(point.tokens for point in points) else "step"
    xs = {point.step: getattr(point, what) for point in points}
    unit, named = next((size, name) for size, name in _UNITS if size <= max(1, *xs.values()))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for number, name in enumerate(names_of(points)):
        known = [
            (point, metric) for point in points if (metric := _metric(point, name)) and metric["value"] is not None
        ]
        title = next(point.tasks[name]["title"] for point in points if name in point.tasks)
        axes.errorbar(
            [xs[point.step] / unit for point, _ in known],
            [metric["value"] for _, metric in known], yerr=[metric["stderr"] or 0 for _, metric in known],
            label=title, color=f"C{number % 10}", marker="o", markersize=4, capsize=3, linewidth=1.2,
        )  # fmt: skip
    units = dict.fromkeys(point.tasks[name]["unit"] for point in points for name in point.tasks)
    axes.set(xlabel=f"{what}{named}", ylabel=f"{' or '.join(units)}, ± one standard error")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with replaced(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix[1:])
    pyplot.close(figure)


def _metric(point: Point, name: str) -> dict[str, Any] | None:
    results = point.tasks.get(name)
    metric: dict[str, Any] | None = results["metrics"].get(results["headline"]) if results else None
    return metric
