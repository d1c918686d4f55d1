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

from bc2_jax.agreement import first_decides
from bc2_jax.evaluate.asking import Questions, ask, parts_of
from bc2_jax.evaluate.records import NAME, RecordFile, judged_of
from bc2_jax.evaluate.results import summarize
from bc2_jax.evaluate.sandbox import SandboxError, require_sandbox
from bc2_jax.evaluate.scorer import Scorer
from bc2_jax.evaluate.task import Example
from bc2_jax.files import replaced

RESULTS = "results.json"
SUBMISSION = "submission.json"
_AT_ONCE = {"letters": 512, "options": 256, "generation": 128, "code": 128}
"""Items that are asked together, by kind of benchmark: what a program that is killed loses at most."""
Results = dict[str, Any]
Say = Callable[[str, int, int], object]
"""(name of the benchmark, items that are done, all items)."""
Judge = Callable[[Sequence[Example], Sequence[str]], Sequence[bool]]
"""Of the user, for benchmarks that have none: which of the texts that were written are right."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How answers are counted and kept."""

    letter: str = "as_shown"
    """Which way of scoring letters leads: "as_shown" or "bare"."""
    judge: Judge | None = None
    judge_name: str = "judge"
    """Kept with its verdicts: those of a judge of another name are replaced."""


DEFAULT = Way()


def run_task(
    questions: Questions, load: Callable[[], Scorer], folder: Path, way: Way = DEFAULT,
    say: Say = lambda name, done, count: None,
) -> Results:  # fmt: skip
    """The results of a benchmark, with its records in FOLDER/records.jsonl and the figures in FOLDER/results.json.

    Items are asked in parts, which depend on nothing but which items are asked. A part of which all records are there
    is not asked again, so a program that was killed resumes, and ends with the results of one that was not; `load`
    gives the model, and is called only if something is missing. All processes call it, with the same questions, and get
    the results; the first one writes. Raises ValueError for a file that does not hold records, and as `ask`.
    """
    task, examples = questions.task, questions.examples
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
    results: Results = first_decides(lambda: _finish(questions, kept[0], folder, way, say))
    return results


def _tell(say: Say, name: str, before: int, count: int, done: int, of: int) -> None:
    say(name, before + done, count)


def _finish(questions: Questions, kept: RecordFile, folder: Path, way: Way, say: Say) -> Results:
    """What the first process does with the records: judging, the order of the file, results."""
    task = questions.task
    if task.program is not None:
        run_code(questions, kept, say)
    elif way.judge is not None and task.judge is None:
        ask_judge(questions, kept, way.judge, way.judge_name)
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
    assert (program := task.program) is not None
    if waiting:
        # Programs that run too long are stopped by the clock: more of them than cores would stop each other.
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        held = require_sandbox()
        for start in range(0, len(waiting), _AT_ONCE["code"]):
            part = waiting[start : start + _AT_ONCE["code"]]
            outcomes = held.run_all([program(e, kept.records[e.id]["text"]) for e in part], workers=workers)
            kept.add(
                kept.records[example.id] | {"right": {"pass@1": outcome.passed}, "why": outcome.why}
                for example, outcome in zip(part, outcomes, strict=True)
            )
            say(f"{task.name}, running code", start + len(part), len(waiting))


def ask_judge(questions: Questions, kept: RecordFile, judge: Judge, name: str) -> None:
    """Gives what was written to the user's judge, except what it has judged already."""
    records = kept.records
    waiting = [e for e in questions.examples if "text" in records[e.id] and records[e.id].get("judge") != name]
    if waiting:
        verdicts = judge(waiting, [records[example.id]["text"] for example in waiting])
        kept.add(
            records[example.id] | {"right": {"judged": bool(verdict)}, "judge": name}
            for example, verdict in zip(waiting, verdicts, strict=True)
        )


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
