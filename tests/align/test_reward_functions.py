"""Functions of the user: where they are found, what they may return, and how their faults are told."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bc2_jax.align.reward_functions import RewardFunction, load_reward_function

QUESTIONS, ANSWERS = ["a?", "b?"], ["yes", "no"]


def score(function, answers=ANSWERS) -> np.ndarray:
    return RewardFunction("F", function)(QUESTIONS[: len(answers)], answers, [{"n": [1]} for _ in answers])


@pytest.mark.parametrize(
    "returned",
    [
        [1.5, -2], (1.5, -2), np.array([1.5, -2]), np.float16([1.5, -2]), jnp.array([1.5, -2.0]),
        [np.float32(1.5), np.int64(-2)], [jnp.float32(1.5), Fraction(-2)], iter([1.5, -2]), [np.array(1.5), -2],
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_numbers_of_all_kinds(returned):
    rewards = score(lambda *_: returned)
    assert rewards.dtype == np.float32 and rewards.tolist() == [1.5, -2]


def test_true_and_false_are_one_and_zero():
    assert score(lambda prompts, answers, rows: [a == "yes" for a in answers]).tolist() == [1, 0]
    assert score(lambda *_: np.array([True, False])).tolist() == [1, 0]


def test_a_function_that_computes_with_jax_under_the_loops_guard():
    with jax.transfer_guard("disallow"):
        assert score(lambda prompts, answers, rows: jnp.array([len(a) for a in answers]) * 2.0).tolist() == [6, 4]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, None], "returned None for answer 1: each reward must be a number that is finite in fp32"),
        ([float("nan"), 1], "returned nan for answer 0"),
        (np.array([1, np.inf]), "returned inf for answer 1"),
        ([1e39, 0], r"returned 1e\+39 for answer 0"),
        ([10**400, 0], "returned 10+.* for answer 0: each reward"),
        (["1", 2], "returned '1' for answer 0"),
        ([[1.0], [2.0]], r"returned \[1.0\] for answer 0"),
        ([1j, 1], "returned 1j for answer 0"),
        ([1.0], "returned 1 values: it must be 2 numbers, one for each answer"),
        (np.zeros(3), "returned 3 values"),
        (np.zeros((2, 1)), "returned array.*: it must be 2 numbers"),
        (0.5, "returned 0.5: it must be 2 numbers"),
        (jnp.float32(1), "returned array.*: it must be 2 numbers"),
        (None, "returned None: it must be 2 numbers"),
        ("12", "returned '12': it must be 2 numbers"),
        ({"a": 1, "b": 2}, "returned {'a': 1, 'b': 2}: it must be 2 numbers"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(returned, message):
    with pytest.raises(ValueError, match=f"reward function F {message}"):
        score(lambda *_: returned)


def test_what_the_function_changes_is_its_own():
    rows, answers = [{"n": [1]}, {"n": [1]}], list(ANSWERS)

    def spoil(prompts, answers, rows):
        rows[0]["n"].append(2)
        answers.pop()
        return [len(row["n"]) for row in rows]

    for _ in "ab":
        assert RewardFunction("F", spoil)(QUESTIONS, answers, rows).tolist() == [2, 1]
    assert rows[0] == {"n": [1]} and answers == ANSWERS


FILE = """
import json

def reward(prompts, answers, rows):
    return [{"yes": 1.0}[answer] for answer in answers]

def lines(prompts, answers, rows):
    return [json.loads(answer) for answer in answers]

def ends(prompts, answers, rows):
    raise SystemExit(3)

def later(prompts, answers, rows):
    for answer in answers:
        yield 1 / len(answer)

NUMBER = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "json.py").write_text(FILE)  # named as an existing module
    return str(tmp_path / "json.py")


def test_a_function_of_a_file(file):
    assert load_reward_function(f"{file}:reward")(["?"], ["yes"], [{}]).tolist() == [1]
    assert Path(sys.modules["json"].__file__) != Path(file)


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("reward", ["yes", "no"], r"reward raised KeyError: 'no' \(line 5 of .*json.py\)"),
        ("lines", ["1", "{"], r"lines raised JSONDecodeError: .* \(line 8 of .*json.py\)"),
        ("ends", ["1", "2"], r"ends raised SystemExit: 3 \(line 11 of .*json.py\)"),
        ("later", ["1", ""], r"later raised ZeroDivisionError: division by zero \(line 15 of .*json.py\)"),
    ],
)
def test_a_fault_names_the_line(file, name, answers, message):
    with pytest.raises(ValueError, match=message):
        load_reward_function(f"{file}:{name}")(QUESTIONS, answers, [{}, {}])


def test_a_function_of_a_module():
    function = load_reward_function("bc2_jax.align.checkable:same_language")
    assert function(["Hello"], ["你好"], [{}]).tolist() == [0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reward", r"ppo.reward = 'reward' is not valid: it must be FILE.py:NAME or MODULE:NAME"),
        ("FILE:", "it must be FILE.py:NAME"),
        ("nowhere.py:reward", "there is no file 'nowhere.py'"),
        ("no.such.module:reward", "can't be loaded: 'no.such.module' raised ModuleNotFoundError: No module named 'no'"),
        ("FILE:NUMBER", "'.*json.py' has no function 'NUMBER'; it has reward, lines, ends, later"),
        ("FILE:other", "has no function 'other'; it has reward"),
    ],
)
def test_what_is_no_function(file, name, message):
    with pytest.raises(ValueError, match=message):
        load_reward_function(name.replace("FILE", file), "ppo.reward")


@pytest.mark.parametrize(
    ("source", "message"),
    [("def reward(:", "raised SyntaxError.*line 1"), ("x = 1\nx.y\n", r"raised AttributeError.* \(line 2 of .*f.py\)")],
)
def test_a_file_that_does_not_run(tmp_path, source, message):
    (tmp_path / "f.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        load_reward_function(f"{tmp_path}/f.py:reward")
