"""The results of a benchmark from its records: figures with standard errors, what to know about them, and tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from bc2_jax.evaluate.asking import Questions
from bc2_jax.evaluate.records import Record, finite, gold_log_prob, judged_of
from bc2_jax.evaluate.task import Task
from bc2_jax.terminal import make_table

Results = dict[str, Any]  # as `summarize` returns them
PAPER = ("7B", "13B")  # base models with figures in the paper
_ENDS = {"stopped": "at a stop text", "eos": "by the end-of-text token", "length": "by the limit of new tokens"}


def summarize(questions: Questions, records: Sequence[Record], letter: str = "as_shown") -> Results:
    """The results as JSON; `records` are those of `questions.examples`, in their order.

    metrics: name -> {value, stderr, items}, in `unit` (percent or points), null if unknown; the first is `headline`,
    which compares with `paper`. answers: way of scoring -> letter -> count; under "gold" the right letters.
    """
    task = questions.task
    judged = [judged_of(e, record, letter) for e, record in zip(questions.examples, records, strict=True)]
    metrics = task.summarize(judged)
    gold = [value for value in map(gold_log_prob, records) if value is not None]
    return {
        "task": task.name, "title": task.title, "kind": task.kind, "shots": questions.shots,
        "items": len(records), "items_of_files": len(questions.items), "groups": len({r["group"] for r in records}),
        "prompts_sha256": questions.prompts_sha256,
        "unit": task.unit, "headline": next(iter(metrics), None), "letter": letter if task.kind == "letters" else None,
        "metrics": {name: finite(metric._asdict()) for name, metric in metrics.items()},
        "gold_nats": -math.fsum(gold) / len(gold) if gold else None,
        "answers": _count_answers(records) if task.kind == "letters" else {},
        "endings": dict(Counter(record["reason"] for record in records if "reason" in record)),
        "dropped_shots": {
            "items": sum(record["dropped_shots"] > 0 for record in records),
            "shots": sum(record["dropped_shots"] for record in records),
            "headers": sum(record["header_dropped"] for record in records),
        },
        "cut": {
            "items": sum(record["cut"] > 0 for record in records), "tokens": sum(record["cut"] for record in records)
        },
        "fallbacks": sum(record.get("fallback", False) for record in records),
        "near_ties": sum(record["near_tie"] for record in records),
        "unjudged": sum(not record["right"] for record in records),
        "left_out": dict(questions.left_out),
        "paper": dict(task.paper), "paper_source": task.paper_source,
        "notes": [*task.notes, *questions.notes, *_note_length(task, records), *_note_judges(records)],
    }  # fmt: skip


def _note_length(task: Task, records: Sequence[Record]) -> list[str]:
    most = min((record.get("most_tokens", task.max_new_tokens) for record in records), default=0)
    if most >= task.max_new_tokens:
        return []
    return [f"Answers have at most {most} tokens, half of the model's length, instead of {task.max_new_tokens}."]


def _note_judges(records: Sequence[Record]) -> list[str]:
    names = sorted({record["judge"] for record in records if "judge" in record})
    if len(names) > 1:
        return [f"Verdicts are of different judges ({'; '.join(names)}): give --judge again, to have one judge all."]
    return [f"Judged by {name}." for name in names]


def _count_answers(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    ways: dict[str, Counter[str]] = {}
    for record in records:
        letters = [text.strip() for text in record.get("bare") or record["choices"]]
        for way, answer in record["answers"].items():
            ways.setdefault(way, Counter())[answer] += 1
        ways.setdefault("gold", Counter()).update(letters[place] for place in record["gold"])
    return {way: dict(sorted(counts.items())) for way, counts in ways.items()}


# -------------------------------------------------------------------------------------------------------------- tables


def show_metric(metric: Mapping[str, Any] | None) -> str:
    """value ± standard error."""
    if metric is None or metric["value"] is None:
        return "-"
    error = metric["stderr"]
    return f"{metric['value']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def _paper_cells(results: Results) -> list[str]:
    return ["" if (value := results["paper"].get(size)) is None else f"{value:.2f}" for size in PAPER]


def print_task(console: Console, results: Results) -> None:
    """The table of a benchmark and the lines below it."""
    table = make_table("", "model", *(f"paper {size}" for size in PAPER), "items", numbers_from=1)
    for name, metric in results["metrics"].items():
        paper = _paper_cells(results) if name == results["headline"] else [""] * len(PAPER)
        table.add_row(Text(name), show_metric(metric), *paper, f"{metric['items']:,}")
    groups = f", {results['groups']} groups" if results["groups"] > 1 else ""
    shots = f", {results['shots']} shots" if results["shots"] else ", no shots"
    figures = f"; {results['unit']} ± standard error" if results["metrics"] else "; no figure"
    console.print(f"\n{results['title']}: {_count(results)} items{groups}{shots}{figures}")
    if results["metrics"]:
        console.print(table)
    for line in describe(results):
        console.print(f"  {line}")


def _count(results: Results) -> str:
    asked, total = results["items"], results["items_of_files"]
    return f"{asked:,}" if asked == total else f"{asked:,} of {total:,}"


def describe(results: Results) -> list[str]:
    """Sentences: the distribution of letters, what did not fit, near ties, differences from the paper."""
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
    is_choice = results["kind"] in ("letters", "options")
    counted = (
        (dropped["items"], f"{dropped['shots']} shots dropped from {dropped['items']} prompts that were too long"),
        (dropped["headers"], f"{dropped['headers']} prompts without their header, which did not fit either"),
        (cut["items"], f"{cut['items']} prompts cut at their beginning, by {cut['tokens']} tokens in all"),
        (results["fallbacks"], f"{results['fallbacks']} items with a token that spans prompt and choice"),
        (results["near_ties"], f"{results['near_ties']} items whose two best choices are within rounding"),
        (results["unjudged"], f"{results['unjudged']} items without a verdict: "
         + ("the answers are not published" if is_choice else "give a --judge")),
    )  # fmt: skip
    lines += [line for count, line in counted if count]
    lines += [f"left out of the files: {count} ({why})" for why, count in results["left_out"].items()]
    if results["gold_nats"] is not None:
        lines.append(f"right choice: {results['gold_nats']:.4f} nats (mean of -log p)")
    if results["paper"]:
        lines.append(f"paper: {results['paper_source'] or 'base models'}")
    return [*lines, *results["notes"]]


def print_summary(console: Console, everything: Sequence[Results], title: str) -> None:
    """One line per benchmark."""
    table = make_table("benchmark", "metric", "model", *(f"paper {size}" for size in PAPER), "items", title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for results in everything:
        name = results["headline"]
        metric = show_metric(results["metrics"].get(name))
        table.add_row(results["task"], name or "-", metric, *_paper_cells(results), _count(results))
    console.print(table)
    points = [results["task"] for results in everything if results["unit"] == "points"]
    apart = f", of {', '.join(points)} points" if points else ""
    console.print(f"Percent{apart}, ± one standard error. The paper's figures are for its base models.")
