"""Results as tables: the figures of a benchmark beside the paper's, and what should be known when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from bc2_jax.evaluate.runner import Results
from bc2_jax.terminal import make_table

PAPER = ("7B", "13B")
"""Base models whose figures the paper has."""
_ENDS = {"stopped": "at a stop text", "eos": "by the end-of-text token", "length": "by the limit of new tokens"}


def show_metric(metric: Mapping[str, Any] | None) -> str:
    """value +- standard error."""
    if metric is None or metric["value"] is None:
        return "-"
    error = metric["stderr"]
    return f"{metric['value']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def print_task(console: Console, results: Results) -> None:
    """The table of a benchmark and the lines below it."""
    table = make_table("", "model", *(f"paper {size}" for size in PAPER), "items", numbers_from=1)
    for name, metric in results["metrics"].items():
        paper = [results["paper"].get(size) if name == results["headline"] else None for size in PAPER]
        cells = (show_metric(metric), *("" if x is None else f"{x:.2f}" for x in paper), f"{metric['items']:,}")
        table.add_row(Text(name), *cells)
    asked = f"{_count(results)} items"
    groups = f", {results['groups']} groups" if results["groups"] > 1 else ""
    shots = f", {results['shots']} shots" if results["shots"] else ", no shots"
    figures = f"; {results['unit']} ± standard error" if results["metrics"] else "; no figure"
    console.print(f"\n{results['title']}: {asked}{groups}{shots}{figures}")
    if results["metrics"]:
        console.print(table)
    for line in describe(results):
        console.print(f"  {line}")


def _count(results: Results) -> str:
    """How many items were asked, and of how many."""
    asked, there = results["items"], results["items_of_files"]
    return f"{asked:,}" if asked == there else f"{asked:,} of {there:,}"


def describe(results: Results) -> list[str]:
    """Sentences: how letters are spread, what did not fit, what rounding may decide, what the paper leaves open."""
    lines = []
    for way, counts in results["answers"].items():
        total = max(sum(counts.values()), 1)
        shares = ", ".join(f"{letter} {count / total:.0%}" for letter, count in counts.items())
        if counts:
            lines.append(f"{'right letters' if way == 'gold' else f'answered, {way}'}: {shares}")
    if results["endings"]:
        ends = ", ".join(f"{count} {_ENDS.get(why, why)}" for why, count in results["endings"].items())
        lines.append(f"texts ended: {ends}")
    dropped, cut = results["dropped_shots"], results["cut"]
    counted = {
        f"{dropped['shots']} shots left out of {dropped['items']} prompts, which were too long with them":
            dropped["items"],
        f"{dropped['headers']} prompts without their header, which did not fit either": dropped["headers"],
        f"{cut['items']} prompts cut at their beginning, by {cut['tokens']} tokens in all": cut["items"],
        f"{results['fallbacks']} items with a token that reaches across the end of their prompt into a choice":
            results["fallbacks"],
        f"{results['near_ties']} items whose two best choices are so close that rounding decides": results["near_ties"],
        f"{results['unjudged']} items without a verdict" + (
            ": the answers are not published" if results["kind"] in ("letters", "options") else ": give a --judge"
        ): results["unjudged"],
    }  # fmt: skip
    lines += [line for line, count in counted.items() if count]
    lines += [f"left out of the files: {count} ({why})" for why, count in results["left_out"].items()]
    if results["gold_nats"] is not None:
        lines.append(f"right choice: {results['gold_nats']:.4f} nats (mean of -log p)")
    if results["paper"]:
        lines.append(f"paper: {results['paper_source']}" if results["paper_source"] else "paper: base models")
    return [*lines, *results["notes"]]


def print_summary(console: Console, everything: Sequence[Results], title: str) -> None:
    """One line a benchmark."""
    table = make_table("benchmark", "metric", "model", *(f"paper {size}" for size in PAPER), "items", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for results in everything:
        name = results["headline"]
        paper = (results["paper"].get(size) for size in PAPER)
        cells = ("" if x is None else f"{x:.2f}" for x in paper)
        metric = results["metrics"].get(name)
        table.add_row(results["task"], name or "-", show_metric(metric), *cells, _count(results))
    console.print(table)
    points = [results["task"] for results in everything if results["unit"] == "points"]
    apart = f", of {', '.join(points)} points" if points else ""
    console.print(f"Percent{apart}, ± one standard error. The paper's figures are of its base models.")
