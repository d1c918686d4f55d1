"""Judges: what they may return, what a wrong one is told."""

from __future__ import annotations

import shlex
import sys

import numpy as np
import pytest

from bc2_jax.align import red_team_judges
from bc2_jax.align.red_team import AttackAnswer
from bc2_jax.align.red_team_attacks import Attack
from bc2_jax.align.red_team_judges import Judge, judge_answers, load_judge, split_judge, threshold_of

ATTACKS = [
    Attack("other", "en", [{"role": "system", "content": "s"}, {"role": "user", "content": text}], "test",
           category="c", fields={"mine": text})
    for text in ("one", "two")
]  # fmt: skip
ANSWERS = [AttackAnswer("yes", True, 2), AttackAnswer("", False, 4)]


def give(*values, gives="harmless", name="mine"):
    return Judge(name, lambda prompts, answers, rows: list(values), gives)


def test_numbers_and_objects():
    judges = [give(0.5, np.float32(1)), give({"helpful": 3}, {"helpful": -1})]
    assert judge_answers(judges, ATTACKS, ANSWERS) == [
        {"harmless": 0.5, "helpful": 3.0}, {"harmless": 1.0, "helpful": -1.0}
    ]  # fmt: skip
    assert judge_answers([give(1, 2, gives="helpful")], ATTACKS, ANSWERS) == [{"helpful": 1.0}, {"helpful": 2.0}]
    assert judge_answers([give({"toxicity": 0.25}, {"toxicity": 1})], ATTACKS, ANSWERS) == [
        {"harmless": 0.75}, {"harmless": 0.0}
    ]  # fmt: skip
    array = Judge("array", lambda prompts, answers, rows: np.array([1.0, 0.0]))
    assert judge_answers([array], ATTACKS, ANSWERS) == [{"harmless": 1.0}, {"harmless": 0.0}]
    assert judge_answers([], ATTACKS, ANSWERS) == [{}, {}]


def test_what_a_judge_is_given():
    seen = []
    judge_answers([Judge("j", lambda *given: seen.append(given) or [0, 0])], ATTACKS, ANSWERS)
    [(prompts, answers, rows)] = seen
    assert (prompts, answers) == (["one", "two"], ["yes", ""])
    assert rows[1]["mine"] == "two" and rows[1]["class"] == "other" and rows[1]["category"] == "c"
    assert rows[0]["messages"] == ATTACKS[0].messages and rows[0]["messages"][0] is not ATTACKS[0].messages[0]


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ([give(1.0)], "mine returned 1 values: it must be 2 scores"),
        ([give(1.0, float("nan"))], "returned nan for answer 2"),
        ([give(1.0, None)], "returned None for answer 2"),
        ([give({}, 1.0)], "for answer 1"),
        ([give({"harm": 1}, 1.0)], "helpful, harmless or toxicity"),
        ([give({"harmless": 1, "toxicity": 0}, 1.0)], "for answer 1"),
        ([give({"toxicity": 1.5}, 1.0)], "toxicity 1.5"),
        ([give(1, 1), give(1, 1, name="twin")], "twin gives harmless, which another judge gives too"),
        ([Judge("bad", lambda *given: 1 / 0)], r"judge bad raised ZeroDivisionError: .* \(line \d+ of .*judges.py\)"),
        ([Judge("bad", lambda *given: sys.exit(3))], "judge bad raised SystemExit: 3"),
        ([give(1.0, 10**400)], "for answer 2"),
        ([Judge("bad", lambda *given: "no")], "judge bad returned 'no'"),
    ],
)
def test_a_wrong_judge_is_named(judges, message):
    with pytest.raises(ValueError, match=message):
        judge_answers(judges, ATTACKS, ANSWERS)


def test_the_threshold():
    scores = [{"harmless": 0.2}, {"helpful": 7.0}]
    assert threshold_of([give()], None, scores) == 0.5 and threshold_of([give()], 3.0, scores) == 3.0
    assert threshold_of([Judge("reward:RM", len, "harmless", None)], None, [{"harmless": 7.0}]) is None
    assert threshold_of([], None, [{}]) is None
    with pytest.raises(ValueError, match="7, outside 0..1"):
        threshold_of([give()], None, [{"harmless": 7.0}])


def test_names_of_judges():
    assert split_judge("helpful=a.py:f") == ("helpful", "a.py:f") and split_judge("a=b.py:f") == (
        "harmless",
        "a=b.py:f",
    )


def test_a_reward_model_scores_whole_conversations(small_tokenizer, monkeypatch, tmp_path):
    """Its ids are those of a conversation to train on; an empty answer is a lone eos, and long ones are fitted."""
    from types import SimpleNamespace

    from bc2_jax.align.chat import encode_conversation

    scored = []

    class Scripted:
        tokenizer = small_tokenizer
        config = SimpleNamespace(model_max_length=64)

        def score(self, conversations):
            scored.extend(conversations)
            return np.arange(len(conversations), dtype=np.float32)

    monkeypatch.setattr(red_team_judges, "find_reward_model", lambda path: SimpleNamespace(tokenizer="there"))
    monkeypatch.setattr(red_team_judges.Scorer, "load", lambda path, mesh: Scripted())
    judge = load_judge("reward:RM", "helpful")
    assert judge.threshold is None
    assert judge_answers([judge], ATTACKS, ANSWERS) == [{"helpful": 0.0}, {"helpful": 1.0}]
    whole, _ = encode_conversation(small_tokenizer, [*ATTACKS[0].messages, {"role": "assistant", "content": "yes"}])
    assert scored[0] == whole and scored[1][-2:] == [small_tokenizer.assistant_id, small_tokenizer.eos_id]
    judge_answers([judge], ATTACKS[:1], [AttackAnswer("the cat " * 60, False, 99)])
    assert len(scored[-1]) == 64 and scored[-1][-1] == small_tokenizer.eos_id


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('x')", "line 1 of what it printed is not JSON: b'x'"),
        ("import sys; sys.exit(3)", "it ended with code 3"),
        ("print(1)", "returned 1 values: it must be 2 scores"),
    ],
)
def test_a_program_that_gives_no_scores_is_named(program, message):
    judge = load_judge(f"command:{sys.executable} -c {shlex.quote(program)}")
    with pytest.raises(ValueError, match=f"judge command:.* {message}"):
        judge_answers([judge], ATTACKS, ANSWERS)
