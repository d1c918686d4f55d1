"""Asks a model the items of a benchmark that have no record yet, and writes the results of all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from bc2_jax.agreement import first_decides
from bc2_jax.evaluate.asking import Questions, ask, parts_of
from bc2_jax.evaluate.records import NAME, RecordFile, judged_of, write_json
from bc2_jax.evaluate.results import Results, summarize
from bc2_jax.evaluate.sandbox import SandboxError, require_sandbox
from bc2_jax.evaluate.scorer import Scorer
from bc2_jax.evaluate.task import Example

RESULTS = "results.json"
SUBMISSION = "submission.json"
_AT_ONCE = {"letters": 512, "options": 256, "generation": 128, "code": 128}
"""Items asked together by kind of benchmark, the most that a killed program loses."""
Say = Callable[[str, int, int], object]  # (name of the benchmark, items done, all items)
Judge = Callable[[Sequence[Example], Sequence[str]], Sequence[bool]]
"""The user's judge: (examples, generated texts) -> which are right."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How answers are judged."""

    letter: str = "as_shown"  # leading way of scoring letters: "as_shown" or "bare"
    judge: Judge | None = None
    judge_name: str = "judge"  # recorded with its verdicts; verdicts of another name are replaced


DEFAULT = Way()


def run_task(
    questions: Questions, load: Callable[[], Scorer], folder: Path, way: Way = DEFAULT,
    say: Say = lambda name, done, count: None,
) -> Results:  # fmt: skip
    """Asks what FOLDER/records.jsonl lacks and writes FOLDER/results.json.

    Items are asked in parts that depend only on which items are asked. Complete parts are skipped, so a killed program
    resumes with the same results. `load` returns the model and is called only if something is missing. All processes
    call it with the same questions and get the results; the first one writes. Raises ValueError for a file that does
    not hold records, and as `ask`.
    """
    task, examples = questions.task, questions.examples
    parts = list(parts_of(examples, _AT_ONCE[task.kind]))
    kept: list[RecordFile] = []  # on the first process

    def find_missing() -> list[int]:
        kept.append(RecordFile(folder / NAME))
        return [number for number, part in enumerate(parts) if not all(e.id in kept[0] for e in part)]

    missing = first_decides(find_missing)
    before = len(examples) - sum(len(parts[number]) for number in missing)

    def tell(done: int, count: int = 0) -> None:
        say(task.name, before + done, len(examples))

    tell(0)
    for number in missing:
        found = ask(task, parts[number], load(), tell)
        if jax.process_index() == 0:
            kept[0].add(found)
        before += len(parts[number])
        tell(0)
    results: Results = first_decides(lambda: _finish(questions, kept[0], folder, way, say))
    return results


def _finish(questions: Questions, kept: RecordFile, folder: Path, way: Way, say: Say) -> Results:
    """On the first process: judges, orders the records and writes the results."""
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
    """Runs generated code without a verdict in the sandbox."""
    task = questions.task
    waiting = [example for example in questions.examples if not kept.records[example.id]["right"]]
    assert (program := task.program) is not None
    if waiting:
        # Time limits are by the clock: more programs than cores would time each other out.
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
        sandbox = require_sandbox()
        for start in range(0, len(waiting), _AT_ONCE["code"]):
            part = waiting[start : start + _AT_ONCE["code"]]
            outcomes = sandbox.run_all([program(e, kept.records[e.id]["text"]) for e in part], workers=workers)
            kept.add(
                kept.records[example.id] | {"right": {"pass@1": outcome.passed}, "why": outcome.why}
                for example, outcome in zip(part, outcomes, strict=True)
            )
            say(f"{task.name}, running code", start + len(part), len(waiting))


def ask_judge(questions: Questions, kept: RecordFile, judge: Judge, name: str) -> None:
    """Gives the texts that the user's judge has not judged yet to it."""
    records = kept.records
    waiting = [e for e in questions.examples if "text" in records[e.id] and records[e.id].get("judge") != name]
    if waiting:
        verdicts = judge(waiting, [records[example.id]["text"] for example in waiting])
        kept.add(
            records[example.id] | {"right": {"judged": bool(verdict)}, "judge": name}
            for example, verdict in zip(waiting, verdicts, strict=True)
        )


def check_sandbox(asked: Sequence[Questions]) -> None:
    """Raises ValueError, on all processes, if code must be run and the first process has no sandbox."""
    names = [questions.task.name for questions in asked if questions.task.program is not None]

    def check() -> None:
        try:
            require_sandbox()
        except SandboxError as error:
            raise ValueError(f"{', '.join(names)} cannot be asked here: {error}.") from error

    if names:
        first_decides(check)
