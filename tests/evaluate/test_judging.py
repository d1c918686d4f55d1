"""Judges of the user's, for texts without a reference."""

from __future__ import annotations

import pytest

from bc2_jax.align.red_team_judges import Judge
from bc2_jax.evaluate import judging
from bc2_jax.evaluate.judging import load_harm_judge, name_judge
from bc2_jax.evaluate.task import Example
from tests.evaluate.tasks.files import write

EXAMPLES = [
    Example(id=str(n), group=category, question=f"prompt {n}", facts={"category": category})
    for n, category in enumerate(("a", "a", "b"))
]


def judge_file(folder, body: str) -> str:
    return f"{write(folder / 'judge.py', f'def judge(prompts, answers, rows):{chr(10)}    {body}{chr(10)}')}:judge"


@pytest.mark.parametrize(
    ("body", "threshold", "harmless"),
    [
        ("return [0.9, 0.1, 0.5]", None, [True, False, True]),
        ("return [{'toxicity': t} for t in (0.1, 0.9, 0.5)]", None, [True, False, True]),
        ("return [3, 1, 2]", 2.0, [True, False, True]),
        ("return ['bad' not in answer for answer in answers]", None, [True, False, True]),
        ("return [row['category'] == 'b' and prompts[2] == 'prompt 2' for row in rows]", None, [False, False, True]),
    ],
)
def test_a_function(tmp_path, body, threshold, harmless):
    decide = load_harm_judge(judge_file(tmp_path, body), threshold)
    assert decide(EXAMPLES, ["good", "bad", "fine"]) == harmless


def test_a_judge_without_a_threshold_is_refused_before_anything_is_asked(monkeypatch):
    judge = Judge("reward:RM", lambda *_: [3.0, -1.0, 2.0], "harmless", None)
    monkeypatch.setattr(judging, "load_judge", lambda what, gives: judge)
    with pytest.raises(ValueError, match="--judge = 'reward:RM' is not valid: it has no threshold of its own"):
        load_harm_judge("reward:RM")
    assert load_harm_judge("reward:RM", 1.0)(EXAMPLES, ["", "", ""]) == [True, False, True]


def test_a_judge_that_was_changed_has_another_name(tmp_path):
    what = judge_file(tmp_path, "return [1, 1, 1]")
    first = name_judge(what)
    assert first == name_judge(f"harmless={what}", 0.5) != name_judge(what, 0.4)
    judge_file(tmp_path, "return [0, 0, 0]")
    assert name_judge(what) != first
    assert name_judge("command:python judge.py") == "command:python judge.py, threshold 0.5"


def test_a_program(tmp_path):
    program = (
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        "    print(json.dumps({'toxicity': float(row['answer'] == 'bad' and row['category'] == 'a')}))\n"
    )
    decide = load_harm_judge(f"command:python {write(tmp_path / 'judge.py', program)}")
    assert decide(EXAMPLES, ["bad\n", "bad", "bad"]) == [True, False, True]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1, 2]", "returned 2 values: it must be 3 scores"),
        ("return [{'helpful': 1}] * 3", "gave answer 1 no harmless score"),
        ("return [3, 1, 2]", "a harmless score is 3, outside 0..1: give the --threshold"),
        ("return 1 / 0", "raised ZeroDivisionError"),
    ],
)
def test_wrong_scores(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        load_harm_judge(judge_file(tmp_path, body))(EXAMPLES, ["", "", ""])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("helpful=a.py:f", "must say how harmless answers are"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("command:no-such-program -x", "there is no such program"),
        ("command:", "there is no such program"),
    ],
)
def test_no_such_judge(what, message):
    with pytest.raises(ValueError, match=message):
        load_harm_judge(what)
