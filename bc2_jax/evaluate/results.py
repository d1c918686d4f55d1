"""What the records of a benchmark come to: figures with their errors, and what should be known beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bc2_jax.evaluate.asking import Questions
from bc2_jax.evaluate.records import Record, gold_log_prob, judged_of
from bc2_jax.evaluate.task import Metric, Task


def summarize(questions: Questions, records: Sequence[Record], letter: str = "as_shown") -> dict[str, Any]:
    """The results as JSON: `records` are those of `questions.examples`, in their order.

    metrics: name -> {value, stderr, items}, in `unit` (percent, or points as of BLEU), null where there is none; the
    first name is `headline`, beside `paper`. answers: way of scoring -> letter -> how often it was answered; under
    "gold", how often it was right.
    """
    task = questions.task
    judged = [judged_of(e, record, letter) for e, record in zip(questions.examples, records, strict=True)]
    metrics = task.summarize(judged)
    gold = mean(value for value in map(gold_log_prob, records) if value is not None)
    return {
        "task": task.name, "title": task.title, "kind": task.kind, "shots": questions.shots,
        "items": len(records), "items_of_files": len(questions.items), "groups": len({r["group"] for r in records}),
        "prompts_sha256": questions.prompts_sha256,
        "unit": task.unit, "headline": next(iter(metrics), None), "letter": letter if task.kind == "letters" else None,
        "metrics": {name: _as_json(metric) for name, metric in metrics.items()},
        "gold_nats": None if gold is None else -gold,
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
        "notes": [*task.notes, *questions.notes, *_shorter(task, records), *_judges(records)],
    }  # fmt: skip


def _shorter(task: Task, records: Sequence[Record]) -> list[str]:
    """Whether answers had less room than the benchmark gives them."""
    most = min((record.get("most_tokens", task.max_new_tokens) for record in records), default=0)
    if most >= task.max_new_tokens:
        return []
    return [f"Answers have at most {most} tokens, half of the model's length, instead of {task.max_new_tokens}."]


def _judges(records: Sequence[Record]) -> list[str]:
    """Whose verdicts they are, where the user gave a judge."""
    names = sorted({record["judge"] for record in records if "judge" in record})
    if len(names) > 1:
        return [f"Verdicts are of different judges ({'; '.join(names)}): give --judge again, to have one judge all."]
    return [f"Judged by {name}." for name in names]


def mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def _as_json(metric: Metric) -> dict[str, float | None]:
    finite = {name: value if math.isfinite(value) else None for name, value in metric._asdict().items()}
    return {**finite, "items": metric.items}


def _count_answers(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    ways: dict[str, Counter[str]] = {}
    for record in records:
        letters = [text.strip() for text in record.get("bare") or record["choices"]]
        for way, answer in record["answers"].items():
            ways.setdefault(way, Counter())[answer] += 1
        ways.setdefault("gold", Counter()).update(letters[place] for place in record["gold"])
    return {way: dict(sorted(counts.items())) for way, counts in ways.items()}
