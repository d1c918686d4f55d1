"""MBPP from files in its format; the programs are run here, since they are ours."""

from __future__ import annotations

from typing import Any

import pytest

from bc2_jax.evaluate.tasks.mbpp import TASK, extract
from tests.evaluate.tasks.files import write_lines
from tests.evaluate.tasks.test_humaneval import passes


def item(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "text": f"Write a function to add {number}.",
        "code": f"def add_{number}(n):\r\n    return n + {number} ",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert add_{number}(1) == {number + 1}", f"assert add_{number}(0) == {number}"],
        "challenge_test_list": [],
    } | fields


def load(folder, *items):
    write_lines(folder / "mbpp" / "mbpp.jsonl", items)
    return TASK.load(folder)


def test_examples(tmp_path):
    loaded = load(tmp_path, *map(item, range(1, 520)))
    assert [int(example.id) for example in loaded.examples] == list(range(11, 511))
    assert loaded.left_out == {"tasks of other splits": 519 - 503} and loaded.notes == ()
    first = loaded.examples[0]
    asked = (
        "You are an expert Python programmer, and here is your task: Write a function to add {0}. Your code should "
        "pass these tests:\n\n assert add_{0}(1) == {1}\n assert add_{0}(0) == {0}  \n\n[BEGIN]\n"
    )
    code = " 'def add_{0}(n):\r\n    return n + {0}' \n[DONE] \n\n \n"
    assert first.prompt == "".join((asked + code).format(n, n + 1) for n in (2, 3, 4)) + asked.format(11, 12)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (" 'def f():\r\n  return 1' \n", "def f():\r\n  return 1"),
        ("'def f():\n  return 1", "def f():\n  return 1"),
        ("def f():\n  return 'a'\n[DONE]\nmore", "def f():\n  return 'a'"),
        ("'def f():\n  return 'a'' ", "def f():\n  return 'a'"),
        ("[BEGIN]\n 'x = 1'", "x = 1"),
        ("'''doc'''\nx = 1", "'''doc'''\nx = 1"),
        ("", ""),
    ],
)
def test_extract(text, code):
    assert extract(text) == code


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 'def add_11(n):\r\n  return n + 11' \n", True),
        ("def add_11(n):\n  return n + 11", True),
        ("def add_11(n):\n  return n + 12", False),
        ("", False),
    ],
)
def test_programs(tmp_path, text, right):
    example = load(tmp_path, *map(item, (2, 3, 4, 11))).examples[0]
    assert TASK.program is not None
    assert passes(TASK.program(example, text)) is right


def test_setup_may_need_the_code(tmp_path):
    tests = {"test_setup_code": "start = Start(5)\r\n", "test_list": ["assert start.n == 5"]}
    loaded = load(tmp_path, item(2), item(3), item(4), item(11, **tests))
    assert "has 1 tasks to test instead of 500" in loaded.notes[0]
    assert TASK.program is not None
    assert passes(TASK.program(loaded.examples[0], "class Start:\n  def __init__(self, n): self.n = n"))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([item(3), item(4), item(11)], "lacks task 2, which are shots: mbpp.jsonl"),
        ([item(2), item(3), item(4), item(600)], "has no task with a task_id in 11-510"),
        ([item(2), item(2)], "mbpp.jsonl:2: 'task_id' is 2; it must be a whole number, each once"),
        ([item(2, task_id="2")], "'task_id' is '2'; it must be a whole number"),
        ([item(2), item(3), item(4), item(11, test_list="assert 1")], "'test_list' is 'assert 1'; it must be a list"),
        ([{"task_id": 2, "prompt": "sanitized"}], "lacks 'text'"),
    ],
)
def test_files_that_are_damaged(tmp_path, items, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *items)
