"""Benchmarks like Toxigen and BHED, whose prompts are not released: the user supplies prompts and a judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bc2_jax.align.intervals import wilson
from bc2_jax.evaluate.task import Example, Judged, Loaded, Metric, Task
from bc2_jax.evaluate.tasks.reading import Row, find_file, read_rows
from bc2_jax.validation import show

_Z = 1.96


def load(data_dir: Path, names: Sequence[str], source: str) -> Loaded:
    """The prompts in file order; an example's group is its category, and its group if it has one."""
    path = find_file(data_dir, names, ("",), ("prompts.jsonl", "prompts.json"), source)
    return Loaded([_example(number, row) for number, row in enumerate(read_rows(path, needed=("category", "prompt")))])


def _example(number: int, row: Row) -> Example:
    category, group = row.filled("category").strip(), row.values.get("group")
    if group is not None and (not isinstance(group, str) or not group.strip()):
        raise ValueError(f"{row.where}: 'group' is {show(group)}; it must be text, or be left out.")
    facts = {"category": category} | ({"group": group.strip()} if group else {})
    name = f"{category}, {group.strip()}" if group else category
    return Example(str(number), name, row.filled("prompt"), facts=facts)


def summarize(judged: Sequence[Judged], harmful: bool) -> dict[str, Metric]:
    """The percentage that is harmless (or harmful): of all, by category, and by group.

    The standard error is half of Wilson's 95 % interval over 1.96, which stays positive if none or all are harmful.
    Items without a verdict are skipped.
    """
    name = "toxic" if harmful else "harmless"
    parts: dict[str, list[bool]] = defaultdict(list)
    for one in judged:
        if "judged" in one.right:
            counts = one.right["judged"] != harmful
            category = one.example.facts["category"]
            for part in dict.fromkeys((name, f"{name}, {category}", f"{name}, {one.example.group}")):
                parts[part].append(counts)
    return {part: _share(parts[part]) for part in sorted(parts)}


def _share(counts: Sequence[bool]) -> Metric:
    low, high = wilson(sum(counts), len(counts), _Z)
    return Metric(100 * sum(counts) / len(counts), 100 * (high - low) / (2 * _Z), len(counts))


def _make(
    name: str, title: str, names: Sequence[str], about: str, notes: tuple[str, ...], stops: tuple[str, ...], most: int,
    harmful: bool, paper: Mapping[str, float], paper_source: str,
) -> Task:  # fmt: skip
    source = (
        f"prompts.jsonl, JSON lines with prompt, category {about} and, if there are any, group, in "
        f"DATA_DIR/{names[0]}; nothing is supplied."
    )
    return Task(
        name=name,
        title=title,
        source=source,
        kind="generation",
        shots=0,
        load=partial(load, names=names, source=source),
        paper=paper,
        paper_source=paper_source,
        notes=(
            *notes,
            "The answers are in records.jsonl. Figures need a judge of yours (--judge, docs/benchmarks.md).",
        ),
        summarize=partial(summarize, harmful=harmful),
        stops=stops,
        max_new_tokens=most,
    )


TOXIGEN_LIKE = _make(
    "toxigen_like",
    "Toxigen-like",
    ("toxigen_like", "toxigen"),
    "(the paper: neutral or hate)",
    (
        "The paper makes 6-shot prompts of SafeNLP's cleaned statements, neutral and hate for 13 groups of people, "
        "grouped in an unpublished way. It samples at temperature 0.1 and top-p 0.9 (here: greedy) and judges with "
        "a fine-tuned HateBERT. The answer is one line, the next statement of the list.",
    ),
    ("\n",),
    128,
    harmful=True,
    paper={"7B": 11.72, "13B": 11.48},
    paper_source="Table 8, share judged toxic; comparable only with the same prompts and judge",
)
BHED_LIKE = _make(
    "bhed_like",
    "BHED-like",
    ("bhed_like", "bhed"),
    "(the paper: sensitive topics, discrimination, profanity, unethical content, physical health, mental health, "
    "financial privacy)",
    (
        "BHED is not released, its judge is not described, and the paper's figures are for chat models. The prompt is "
        "used verbatim: for a chat model it must contain the chat tokens.",
    ),
    (),
    512,
    harmful=False,
    paper={},
    paper_source="none for base models: Table 9 is for chat models",
)
