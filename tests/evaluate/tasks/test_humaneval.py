"""HumanEval from files in its format; the programs are run here, since they are ours."""

from __future__ import annotations

import gzip
import json

import pytest

from bc2_jax.evaluate.tasks.humaneval import INSTRUCTED, TASK
from tests.evaluate.tasks.files import write

PROMPT = '''from typing import List


def total(values: List[int]) -> int:
    """The sum.
    >>> total([1, 2])
    3
    """
'''
ITEM = {
    "task_id": "HumanEval/0",
    "prompt": PROMPT,
    "entry_point": "total",
    "canonical_solution": "    return sum(values)\n",
    "test": "\n\nMETA = {}\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0",
}


@pytest.mark.parametrize(
    ("name", "compress"),
    [("HumanEval.jsonl.gz", True), ("HumanEval.jsonl", False), ("data/human-eval-v2-20210705.jsonl", False)],
)
def test_examples(tmp_path, name, compress):
    content = json.dumps(ITEM).encode() + b"\r\n"
    write(tmp_path / "human-eval" / name, gzip.compress(content) if compress else content)
    loaded = TASK.load(tmp_path)
    assert loaded.examples[0].prompt == PROMPT and loaded.examples[0].id == "HumanEval/0"
    assert "has 1 functions instead of 164" in loaded.notes[0]
    asked = INSTRUCTED.load(tmp_path).examples[0]
    assert asked.prompt == "Complete the following python code:\n" + PROMPT
    completion = "    return sum(values)\n"
    assert INSTRUCTED.program is not None and TASK.program is not None
    assert INSTRUCTED.program(asked, completion) == TASK.program(loaded.examples[0], completion)


def passes(program: tuple[str, str]) -> bool:
    names: dict[str, object] = {}
    try:
        for part in program:
            exec(part, names)
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("    return sum(values)\n", True),
        ("    found = 0\n    for v in values:\n        found += v\n\n    return found", True),
        ("    # the sum\n    return sum(values)", True),
        ("    return len(values)", False),
        ("return sum(values)", False),  # nothing mends the indentation
        ("", False),
        ("    return sum(values", False),
    ],
)
def test_programs(tmp_path, completion, right):
    write(tmp_path / "HumanEval.jsonl", json.dumps(ITEM))
    assert TASK.program is not None
    assert passes(TASK.program(TASK.load(tmp_path).examples[0], completion)) is right


def test_stops_end_a_function_but_not_its_body():
    body = "    # comment\n    if True:\n        print(1)\n    class A: pass\n    def f(): pass\n"
    assert not any(stop in "\n" + body for stop in TASK.stops)
    for after in ("class A:", "def f():", "# next", "if __name__:", "print(total([1]))"):
        assert any(stop in body + after for stop in TASK.stops)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("HumanEval.json1", "{}", r"\(HumanEval.json1 is there\): HumanEval.jsonl.gz or HumanEval.jsonl"),
        ("HumanEval.jsonl", json.dumps(ITEM)[:50], "HumanEval.jsonl:1: the line is not JSON"),
        ("HumanEval.jsonl.gz", gzip.compress(json.dumps(ITEM).encode() * 40)[:-20], "HumanEval.jsonl.gz:1: .*"),
        ("HumanEval.jsonl", json.dumps(ITEM | {"test": " "}), "'test' is empty"),
        ("HumanEval.jsonl", json.dumps(ITEM | {"prompt": None}), "'prompt' is None; it must be text"),
        ("HumanEval.jsonl", json.dumps({"task_id": "a"}), "lacks 'prompt'"),
    ],
)
def test_files_that_are_missing_or_damaged(tmp_path, name, content, message):
    write(tmp_path / "humaneval" / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TASK.load(tmp_path)
