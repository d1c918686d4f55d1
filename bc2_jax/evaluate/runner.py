"""A model put to benchmarks: what is known already stays, what is missing is asked, figures come from the records."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from bc2_jax.agreement import first_decides, require_agreement
from bc2_jax.align.reward_functions import RewardFunction
from bc2_jax.evaluate.asking import Questions, ask, parts_of
from bc2_jax.evaluate.records import NAME, RecordFile, judged_of
from bc2_jax.evaluate.results import summarize
from bc2_jax.evaluate.sandbox import SandboxError, require_sandbox
from bc2_jax.evaluate.scorer import Scorer
from bc2_jax.files import replaced

RESULTS = "results.json"
SUBMISSION = "submission.json"
_AT_ONCE = {"letters": 512, "options": 256, "generation": 128, "code": 128}
"""Items that are asked together, by kind of benchmark: what a program that is killed loses at most."""
Results = dict[str, Any]
Say = Callable[[str, int, int], object]
"""(name of the benchmark, items that are done, all items)."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How answers are counted and kept."""

    letter: str = "as_shown"
    """Which way of scoring letters leads: "as_shown" or "bare"."""
    judge: RewardFunction | None = None
    """judge(prompts, texts, rows) of the user, for benchmarks that have none: a text of 0.5 or more counts as right."""


DEFAULT = Way()


def run_task(
    questions: Questions, load: Callable[[], Scorer], folder: Path, way: Way = DEFAULT,
    say: Say = lambda name, done, count: None,
) -> Results:  # fmt: skip
    """The results of a benchmark, with its records in FOLDER/records.jsonl and the figures in FOLDER/results.json.

    Items are asked in parts that depend on which are asked alone. A part of which all records are there is not asked
    again, so a program that was killed goes on, and ends with the bytes of one that was not; `load` gives the model,
    and is called only if something is missing. All processes call it, with the same questions, and get the results; the
    first one writes. Raises ValueError for records that are no records, and as `ask`.
    """
    task, examples = questions.task, questions.examples
    require_agreement({"prompts (SHA-256)": questions.prompts_sha256, "items": len(examples)})
    parts = list(parts_of(examples, _AT_ONCE[task.kind]))
    kept: list[RecordFile] = []

    def find_missing() -> list[int]:
        kept.append(RecordFile(folder / NAME))
        return [number for number, part in enumerate(parts) if not all(e.id in kept[0] for e in part)]

    missing = first_decides(find_missing)
    done = len(examples) - sum(len(parts[number]) for number in missing)
    say(task.name, done, len(examples))
    for number in missing:
        tell = functools.partial(_tell, say, task.name, done, len(examples))
        found = ask(task, parts[number], load(), tell)
        if jax.process_index() == 0:
            kept[0].add(found)
        done += len(parts[number])
        say(task.name, done, len(examples))
    if way.judge is not None and task.kind == "generation" and task.judge is None:
        ask_judge(questions, kept, way.judge)
    results: Results = first_decides(lambda: _finish(questions, kept[0], folder, way, say))
    return results


def _tell(say: Say, name: str, before: int, count: int, done: int, of: int) -> None:
    say(name, before + done, count)


def _finish(questions: Questions, kept: RecordFile, folder: Path, way: Way, say: Say) -> Results:
    """What the first process does with the records: judging, the order of the file, results."""
    task = questions.task
    run_code(questions, kept, say)
    kept.put_in_order(questions.items)
    records = [kept.records[example.id] for example in questions.examples]
    results = summarize(questions, records, way.letter)
    write_json(folder / RESULTS, results)
    if task.submission is not None:
        judged = [judged_of(e, record, way.letter) for e, record in zip(questions.examples, records, strict=True)]
        write_json(folder / SUBMISSION, task.submission(judged))
    return results


def run_code(questions: Questions, kept: RecordFile, say: Say) -> None:
    """Runs generated code in the sandbox where a record has no verdict yet."""
    task = questions.task
    waiting = [example for example in questions.examples if not kept.records[example.id]["right"]]
    if task.program is not None and waiting:
        program = task.program
        # Programs that run too long are stopped by the clock: more of them than cores would stop each other.
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        held = require_sandbox()
        for start in range(0, len(waiting), _AT_ONCE["code"]):
            part = waiting[start : start + _AT_ONCE["code"]]
            outcomes = held.run_all([program(e, kept.records[e.id]["text"]) for e in part], workers=workers)
            kept.add(
                kept.records[example.id] | {"right": {"passed": outcome.passed}, "why": outcome.why}
                for example, outcome in zip(part, outcomes, strict=True)
            )
            say(f"{task.name}, running code", start + len(part), len(waiting))


def ask_judge(questions: Questions, kept: list[RecordFile], judge: RewardFunction) -> None:
    """Gives what was written and has no verdict yet to the user's judge, by all processes."""

    def find_waiting() -> list[list[str]]:
        records = (kept[0].records[example.id] for example in questions.examples)
        return [[r["id"], r["prompt"], r["text"]] for r in records if "text" in r and not r["right"]]

    waiting = first_decides(find_waiting)
    if not waiting:
        return
    facts = {e.id: {"id": e.id, "group": e.group, **e.facts} for e in questions.examples}
    scores = judge(
        [prompt for _, prompt, _ in waiting], [text for *_, text in waiting], [facts[item] for item, *_ in waiting]
    )

    def keep() -> None:
        kept[0].add(
            kept[0].records[item] | {"judge": float(score), "right": {"judged": bool(score >= 0.5)}}
            for (item, *_), score in zip(waiting, scores, strict=True)
        )

    first_decides(keep)


def check_sandbox(asked: Sequence[Questions]) -> None:
    """Raises ValueError, on all processes, if code has to be run and the first process has no sandbox for it."""
    names = [questions.task.name for questions in asked if questions.task.program is not None]

    def check() -> None:
        try:
            require_sandbox()
        except SandboxError as error:
            raise ValueError(f"{', '.join(names)} cannot be asked here: {error}.") from error

    if names:
        first_decides(check)


def write_json(path: Path, value: Any) -> None:
    """`value`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
