"""Which items are asked, how their prompts fit, and what is recorded, with a scorer whose numbers are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.evaluate import asking
from bc2_jax.evaluate.asking import ask, choose_evenly, parts_of, read_questions
from bc2_jax.evaluate.task import Loaded
from tests.evaluate.fakes import FakeScorer, letters, task_of, to_write


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 70), st.integers(1, 20))
def test_some_items_are_taken_evenly_and_parts_hold_all(count: int, groups: int, limit: int, size: int):
    examples = letters(count, min(groups, count))
    chosen = choose_evenly(examples, limit)
    assert len(chosen) == min(limit, count) and [e for e in examples if e in chosen] == chosen
    taken = [sum(e.group == g for e in chosen) for g in dict.fromkeys(e.group for e in examples)]
    there = [sum(e.group == g for e in examples) for g in dict.fromkeys(e.group for e in examples)]
    # A group has fewer than another by more than one only if it has no more.
    assert all(t == n or t >= max(taken) - 1 for t, n in zip(taken, there, strict=True))
    assert all(e in chosen for e in choose_evenly(examples, max(limit - 1, 1)))
    parts = list(parts_of(examples, size))
    assert [e for part in parts for e in part] == examples and all(len(part) <= 2 * size for part in parts)
    assert all(len(part) >= size for part in parts[:-1])


def test_letters_are_scored_both_ways(tokenizer):
    examples, scorer = letters(6), FakeScorer(tokenizer)
    for example, record in zip(examples, ask(task_of(examples), examples, scorer), strict=True):
        ids = tokenizer.encode(example.prompt)
        each = [
            [scorer.score([(ids, tokenizer.encode(text))])[0].log_prob for text in texts]
            for texts in (example.choices, example.bare)
        ]
        assert record["prompt"] == example.prompt and record["dropped_shots"] == 0 and not record["fallback"]
        assert [record["log_probs"], record["bare_log_probs"]] == each
        best = [int(np.argmax(scores)) for scores in each]
        assert record["answers"] == {"as_shown": "ABC"[best[0]], "bare": "ABC"[best[1]]}
        assert record["right"] == {"as_shown": best[0] in example.gold, "bare": best[1] in example.gold}


def test_letters_that_are_shown_bare_are_scored_once(tokenizer):
    examples, scorer = letters(4, choices=("A", "B", "C")), FakeScorer(tokenizer)
    records = ask(task_of(examples), examples, scorer)
    assert scorer.asked == [4 * 3] and all(r["log_probs"] == r["bare_log_probs"] for r in records)


def test_options_are_also_scored_by_character(tokenizer, monkeypatch):
    values = iter([-4.0, -3.0, -3.0, -3.0])
    monkeypatch.setattr("tests.evaluate.fakes.noise", lambda *what: -next(values) / 10)
    examples = letters(2, 1, choices=("long one", "no"), bare=(), lengths=(8, 2), gold=(0,))
    first, second = ask(task_of(examples, kind="options"), examples, FakeScorer(tokenizer))
    assert first["answers"] == {"acc": "no", "acc_norm": "long one"}
    assert first["right"] == {"acc": False, "acc_norm": True} and not first["near_tie"]
    assert second["answers"]["acc"] == "long one" and second["near_tie"]  # of equal ones the first counts


def test_a_near_tie_of_either_spelling_counts(tokenizer, monkeypatch):
    examples = letters(3, 1)
    for far, expected in (
        ((-1, -2, -3, -1, -2, -3), False),
        ((-1, -1, -3, -1, -2, -3), True),
        ((-1, -2, -3, -2, -1, -1.00001), True),
    ):
        values = iter(far * 3)
        monkeypatch.setattr("tests.evaluate.fakes.noise", lambda *what, values=values: -next(values) / 10)
        records = ask(task_of(examples), examples, FakeScorer(tokenizer))
        assert [record["near_tie"] for record in records] == [expected] * 3


def test_prompts_leave_room_for_what_is_written_in_a_model_that_is_shorter(tokenizer):
    examples = to_write(1).load(Path()).examples
    examples = [dataclasses.replace(examples[0], shots=("one two three\n",) * 9)]
    scorer = FakeScorer(tokenizer, max_length=1000)
    scorer.generation_length = 30
    (record,) = ask(to_write(1), examples, scorer)
    assert record["dropped_shots"] > 0 and len(tokenizer.encode(record["prompt"])) <= 30 - record["most_tokens"]


def test_what_does_not_fit_is_left_out_and_counted(tokenizer):
    examples = letters(3, 1)
    sizes = [len(tokenizer.encode(example.prompt)) for example in examples]
    shot = min(len(tokenizer.encode(s)) for s in examples[0].shots)
    records = ask(task_of(examples), examples, FakeScorer(tokenizer, max_length=min(sizes) - shot + 1))
    assert all(r["dropped_shots"] == 1 and not r["header_dropped"] and r["cut"] == 0 for r in records)
    assert all(r["prompt"] == e.header + e.shots[1] + e.question for r, e in zip(records, examples, strict=True))
    records = ask(task_of(examples), examples, FakeScorer(tokenizer, max_length=2))
    assert all(r["dropped_shots"] == 2 and r["header_dropped"] and r["cut"] > 0 for r in records)


def test_what_was_written_is_judged(tokenizer):
    task = to_write(8)
    records = ask(task, task.load(Path()).examples, FakeScorer(tokenizer))
    assert {r["right"]["exact"] for r in records} == {True, False}
    assert all(r["right"]["exact"] == (r["text"].strip() == r["target"]) for r in records)
    assert all(r["answers"]["exact"] == r["text"].strip() and r["reason"] == "stopped" for r in records)
    own = ask(dataclasses.replace(task, judge=None), task.load(Path()).examples, FakeScorer(tokenizer))
    assert all(r["right"] == {} for r in own)


def test_a_model_that_is_broken_is_told(tokenizer, monkeypatch):
    monkeypatch.setattr("tests.evaluate.fakes.noise", lambda *what: float("nan"))
    with pytest.raises(ValueError, match="log-probabilities that are not finite, first for 'g0/0'"):
        ask(task_of(letters(2)), letters(2), FakeScorer(tokenizer))


def test_all_files_are_read_before_anything_is_asked(monkeypatch, tmp_path):
    def missing(data_dir):
        raise FileNotFoundError(f"{data_dir}/x.csv is missing.")

    twice = task_of([*letters(2, 1), *letters(1, 1)], name="twice")
    tasks = {"quiz": task_of(letters(9)), "bad": task_of([], name="bad", load=missing), "twice": twice}
    monkeypatch.setattr(asking, "find_task", tasks.__getitem__)
    with pytest.raises(ValueError, match=r"(?s)bad: .*x.csv is missing.\ntwice: .*two items are called 'g0/0'"):
        read_questions(["quiz", "bad", "twice"], tmp_path)
    (questions,) = read_questions(["quiz", "quiz"], tmp_path, limit=4, shots=1)
    assert (len(questions.examples), len(questions.items), questions.shots) == (4, 9, 1)
    assert all(len(example.shots) == 1 for example in questions.examples)
    hashes = [
        read_questions(["quiz"], tmp_path, limit=n, shots=s)[0].prompts_sha256 for n, s in ((4, 1), (9, 1), (9, 2))
    ]
    assert hashes[0] == hashes[1] == questions.prompts_sha256 != hashes[2]
    (more,) = read_questions(["quiz"], tmp_path, shots=7)
    assert more.shots == 2 and more.notes == ["There are only 2 shots, not 7."]
    with pytest.raises(ValueError, match="tasks = .* it must name at least one benchmark"):
        read_questions([], tmp_path)
    for field in ("limit", "shots"):
        with pytest.raises(ValueError, match=f"{field} = -1 is not valid"):
            read_questions(["quiz"], tmp_path, **{field: -1})


def test_notes_of_files_stay(monkeypatch, tmp_path):
    task = task_of([], load=lambda data_dir: Loaded(letters(2), {"five options": 3}, ("half is missing",)))
    monkeypatch.setattr(asking, "find_task", lambda name: task)
    (questions,) = read_questions(["quiz"], tmp_path)
    assert questions.left_out == {"five options": 3} and questions.notes == ["half is missing"]
