"""Results of a benchmark that is asked in one go, and of one that is stopped wherever it may be."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bc2_jax.evaluate import asking, runner
from bc2_jax.evaluate.asking import read_questions
from bc2_jax.evaluate.runner import Way, run_task
from bc2_jax.evaluate.sandbox import SandboxError
from tests.evaluate.fakes import FakeScorer, letters, task_of, to_write


@pytest.fixture
def read(monkeypatch, tmp_path):
    def read(task, **settings):
        monkeypatch.setattr(asking, "find_task", lambda name: task)
        monkeypatch.setattr(runner, "_AT_ONCE", dict.fromkeys(runner._AT_ONCE, 4))
        return read_questions(["quiz"], tmp_path, **settings)[0]

    return read


def nothing():
    raise AssertionError("the model is not needed")


@pytest.mark.parametrize("task", [task_of(letters(14)), to_write(10)], ids=["letters", "generation"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(task, read, tokenizer, tmp_path):
    questions, whole, stopped = read(task), tmp_path / "whole", tmp_path / "stopped"
    results = run_task(questions, lambda: FakeScorer(tokenizer), whole)
    content = (whole / "records.jsonl").read_bytes()
    assert content.count(b"\n") == len(questions.items) == results["items"]
    told = []
    for size in (0, 1, content.index(b"\n") + 1, len(content) // 2, len(content) - 1):
        stopped.mkdir(exist_ok=True)
        (stopped / "records.jsonl").write_bytes(content[:size])
        (stopped / "results.json").unlink(missing_ok=True)
        scorer = FakeScorer(tokenizer)
        again = run_task(questions, lambda scorer=scorer: scorer, stopped, say=lambda *what: told.append(what))
        assert again == results and told[-1] == ("quiz", len(questions.items), len(questions.items))
        for name in ("records.jsonl", "results.json"):
            assert (stopped / name).read_bytes() == (whole / name).read_bytes()
        known = content[:size].count(b"\n")
        counts = [len(part) for part in asking.parts_of(questions.examples, 4)]
        missing = [n for place, n in enumerate(counts) if sum(counts[: place + 1]) > known]
        each = 6 if questions.task.kind == "letters" else 1
        assert scorer.asked == [each * n for n in missing]  # parts are asked whole, others not at all
    assert run_task(questions, nothing, stopped) == results


def test_more_items_add_to_those_that_are_there(read, tokenizer, tmp_path):
    few, many = read(task_of(letters(20)), limit=6), read(task_of(letters(20)))
    first = run_task(few, lambda: FakeScorer(tokenizer), tmp_path / "a")
    assert (first["items"], first["items_of_files"]) == (6, 20)
    second = run_task(many, lambda: FakeScorer(tokenizer), tmp_path / "a")
    assert second == run_task(many, lambda: FakeScorer(tokenizer), tmp_path / "b")
    assert (tmp_path / "a" / "records.jsonl").read_bytes() == (tmp_path / "b" / "records.jsonl").read_bytes()
    assert run_task(few, nothing, tmp_path / "a") == first
    assert (tmp_path / "a" / "records.jsonl").read_bytes().count(b"\n") == 20


def test_figures_are_those_of_the_records(read, tokenizer, tmp_path):
    questions = read(task_of(letters(30), paper={"7B": 54.0}, notes=("one note",)))
    results = run_task(questions, lambda: FakeScorer(tokenizer), tmp_path, Way(letter="bare"))
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    for way in ("as_shown", "bare"):
        share = sum(r["right"][way] for r in records) / 30
        assert results["metrics"][way]["value"] == pytest.approx(100 * share)
        assert results["metrics"][way]["stderr"] == pytest.approx(100 * (share * (1 - share) / 29) ** 0.5)
        groups = [[r["right"][way] for r in records if r["group"] == g] for g in ("g0", "g1", "g2")]
        mean = sum(sum(group) / len(group) for group in groups) / 3
        assert results["metrics"][f"{way}, mean of groups"]["value"] == pytest.approx(100 * mean)
        assert sum(results["answers"][way].values()) == 30
    assert results["headline"] == "bare" and results["paper"] == {"7B": 54.0} and results["notes"] == ["one note"]
    assert results["answers"]["gold"] == {"A": 10, "B": 10, "C": 10}
    gold = sum(r["log_probs"][r["gold"][0]] for r in records) / 30
    assert results["gold_nats"] == pytest.approx(-gold)


def test_answers_that_are_not_published_have_no_figure(read, tokenizer, tmp_path):
    task = task_of(letters(5, gold=()), submission=lambda judged: {j.example.id: j.answer for j in judged})
    results = run_task(read(task), lambda: FakeScorer(tokenizer), tmp_path)
    assert results["metrics"] == {} and results["headline"] is None and results["unjudged"] == 5
    sent = json.loads((tmp_path / "submission.json").read_text())
    assert set(sent.values()) <= {"A", "B", "C"} and len(sent) == 5


def test_code_is_run_in_the_sandbox_alone_and_not_twice(read, tokenizer, tmp_path, monkeypatch):
    ran = []

    def run_all(programs, workers):
        ran.extend(programs)
        return [SimpleNamespace(passed="1" in program, why="" if "1" in program else "no") for program, _ in programs]

    task = to_write(10, kind="code", judge=None, program=lambda example, text: (text, "tests"))
    monkeypatch.setattr(runner, "require_sandbox", lambda: SimpleNamespace(run_all=run_all))
    results = run_task(read(task), lambda: FakeScorer(tokenizer), tmp_path)
    assert len(ran) == 10 and results["unjudged"] == 0 and 0 < results["metrics"]["pass@1"]["value"] < 100
    assert run_task(read(task), nothing, tmp_path) == results and len(ran) == 10

    def no_sandbox():
        raise SandboxError("Programs of a model run only inside bubblewrap (no bwrap is installed)")

    monkeypatch.setattr(runner, "require_sandbox", no_sandbox)
    with pytest.raises(ValueError, match="quiz cannot be asked here: .*bubblewrap"):
        runner.check_sandbox([read(task)])
    runner.check_sandbox([read(to_write(2))])


def test_a_judge_of_the_user(read, tokenizer, tmp_path):
    task = to_write(10, judge=None)
    results = run_task(read(task), lambda: FakeScorer(tokenizer), tmp_path)
    assert results["metrics"] == {} and results["unjudged"] == 10

    def judge(examples, texts):
        assert [example.id for example in examples] == [str(n) for n in range(10)]
        return ["1" in text for text in texts]

    judged = run_task(read(task), nothing, tmp_path, Way(judge=judge))
    texts = [json.loads(line)["text"] for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert judged["metrics"]["judged"]["value"] == pytest.approx(10 * sum("1" in text for text in texts))
    assert run_task(read(task), nothing, tmp_path, Way(judge=nothing)) == judged  # what is judged stays so
    assert judged["notes"] == ["Judged by judge."]

    def kind(examples, texts):
        return [True] * len(texts)

    few = run_task(read(task, limit=4), nothing, tmp_path, Way("as_shown", kind, "other"))
    assert few["metrics"]["judged"]["value"] == 100 and few["notes"] == ["Judged by other."]
    assert "different judges (judge; other)" in run_task(read(task), nothing, tmp_path)["notes"][0]
    assert run_task(read(task), nothing, tmp_path, Way("as_shown", kind, "other"))["notes"] == ["Judged by other."]


def test_less_room_than_the_benchmark_gives_is_told(read, tokenizer, tmp_path):
    results = run_task(read(to_write(3)), lambda: FakeScorer(tokenizer, max_length=6), tmp_path)
    assert results["notes"] == ["Answers have at most 3 tokens, half of the model's length, instead of 4."]
    assert run_task(read(to_write(3)), lambda: FakeScorer(tokenizer), tmp_path / "long")["notes"] == []


@pytest.mark.parametrize("content", [b"no\n", b'{"id": 1}\n', b"[]\n"])
def test_a_file_that_holds_something_else_is_named(content, read, tokenizer, tmp_path):
    (tmp_path / "records.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="records.jsonl:1 is not a record of an evaluation"):
        run_task(read(task_of(letters(3))), nothing, tmp_path)
    assert (tmp_path / "records.jsonl").read_bytes() == content
