"""The demo's preferences: what is preferred is right, what is not is told apart by a rule of its own."""

from __future__ import annotations

import collections
import json

import pytest

from bc2_jax.align import demo_preferences
from bc2_jax.align.demo import DemoRows, make_tasks
from bc2_jax.align.demo_preferences import GAPS, language_of, make_pairs, prepare_preferences

DOCUMENTS = {
    "zh": ["却说玄德引军而行，天下大势。分久必合？云长曰：此言是也！"],
    "en": ["The name of a method is the first word of all\nAn attribute reference is a primary followed by a name"],
    "code": ["def first(numbers):\n    return numbers[0] + 1\n"],
}


def test_pairs_differ_as_their_class_says():
    tasks = make_tasks(DOCUMENTS, 400)
    pairs = make_pairs(tasks)
    assert pairs == make_pairs(tasks) != make_pairs(tasks, seed=1)
    answers = {question["content"]: answer["content"] for question, answer in tasks}
    known = set(answers.values())
    counts = collections.Counter(pair["class"] for pair in pairs)
    assert set(counts) == set(GAPS) and counts["wrong"] > len(pairs) / 2
    for pair in pairs:
        right, worse = answers[pair["prompt"]], pair["rejected"]
        assert pair["chosen"] == right != worse and pair["gap"] == GAPS[pair["class"]]
        if pair["class"] == "repeats itself":
            assert set(worse.split()) == {right} and len(worse.split()) >= 3
        elif pair["class"] == "other language":
            assert worse.isascii() != right.isascii()
        else:
            assert worse.isdecimal() == right.isdecimal() and len(worse.split()) == 1
            assert worse.isdecimal() or worse in known | {"Python"}
            assert worse == "Python" or right == "Python" or worse.isascii() == right.isascii()


@pytest.mark.parametrize(
    ("text", "language"),
    [("25 加 6 等于几？", "zh"), ("What is 5 + 7?", "en"), ("Which language is this?\n玄德", "en"), ("12 + 3", "en"),
     ("这是什么语言？\nthe first word", "zh")],
)  # fmt: skip
def test_the_language_of_a_question(text: str, language: str):
    assert language_of(text) == language


def test_no_task_is_among_the_held_out_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_preferences, "demo_documents", lambda cache: DOCUMENTS)
    monkeypatch.setattr(demo_preferences, "_TASKS", 60)
    monkeypatch.setattr(demo_preferences, "_HELD_OUT_PAIRS", 20)
    asked = make_tasks(DOCUMENTS, 60, seed=1)[:5]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"messages": task}) + "\n" for task in asked), encoding="utf-8")
    made = prepare_preferences(DemoRows(tmp_path / "tokenizer.model", (), questions), tmp_path)
    pairs, held_out, prompts = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (made.pairs, made.held_out, made.prompts)
    )
    assert (len(pairs), len(held_out), len(prompts)) == (35, 20, 55)
    assert {p["prompt"] for p in pairs + held_out} == {p["prompt"] for p in prompts}
    assert not {p["prompt"] for p in prompts} & {task[0]["content"] for task in asked}
    times = made.pairs.stat().st_mtime_ns
    assert prepare_preferences(DemoRows(tmp_path / "tokenizer.model", (), questions), tmp_path) == made
    assert (
        made.pairs.stat().st_mtime_ns == times
        and [path.name for path in tmp_path.iterdir() if ".inc" in path.name] == []
    )


def test_nearness_is_of_the_right_answer():
    answers = ["12", " 12\n", "18", "24", "999", "even", "-12", ""]
    found = demo_preferences.nearness([""] * 8, answers, [{"answer": "12"}] * 8)
    assert found == [1, 1, 0.5, 0, 0, 0, 0, 0]
    assert demo_preferences.nearness(["", ""], ["even", "odd"], [{"answer": "even"}] * 2) == [1, 0]
    assert demo_preferences.nearness(["", ""], ["0", "1"], [{"answer": "0"}] * 2) == [1, 0]


def test_a_number_fits_every_language():
    rows = [{"language": "zh"}] * 4 + [{"language": "en"}] * 3
    answers = ["没有", "12", "", "no", "no", "没有", "Python"]
    assert demo_preferences.fits_language([""] * 7, answers, rows) == [1, 1, 1, 0, 1, 0, 1]
