"""When a run asks benchmarks, what it is told, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from bc2_jax.config import CheckpointConfig, EvaluateConfig
from bc2_jax.evaluate import asking, in_loop
from bc2_jax.evaluate.task import Judged, Metric
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train.job import Job
from tests.evaluate.fakes import FakeScorer, letters, task_of, to_write
from tests.train.conftest import small_run as small_run  # a fixture


@pytest.fixture
def start():
    said = []
    return SimpleNamespace(step=0, metadata=None, say=said.append, said=said)


@pytest.fixture
def config(small_run, monkeypatch):
    tasks = {
        "quiz": task_of(letters(20)), "written": to_write(9, name="written"),
        "code": to_write(2, name="code", kind="code", program=lambda e, text: (text, "")),
    }  # fmt: skip
    monkeypatch.setattr(asking, "find_task", tasks.__getitem__)
    monkeypatch.setattr(in_loop, "Scorer", lambda model, tokenizer: FakeScorer(tokenizer, seed=model))
    return dataclasses.replace(
        small_run, eval_every=2, num_steps=9, evaluate=EvaluateConfig(tasks=("quiz,written",), data_dir="x", every=4)
    )


def job(**fields) -> Job:
    return Job(**{**dict.fromkeys(Job._fields), "language_model": lambda params: params, **fields})


def always(done: str) -> bool:
    return True


def test_benchmarks_are_due_at_some_steps(config, start):
    """At multiples of `every`, where a checkpoint is kept for ever, and at the end."""
    tokens = config.tokens_per_step
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(keep_every_tokens=6 * tokens))
    examine = in_loop.with_tasks(config, start, job()).examine
    asked = [step for step in (0, 2, 4, 6, 8, 9) if examine(step, 1, always)]
    assert asked == [0, 4, 6, 8, 9] and [line.split()[1] for line in start.said] == list("04689")
    assert "quiz" in start.said[0] and "written" in start.said[0] and "±" in start.said[0]
    # After a resume, tokens are those that have been trained on, not steps times the size of a batch.
    start.step, start.metadata = 5, SimpleNamespace(tokens=7 * tokens)
    examine = in_loop.with_tasks(config, start, job()).examine
    assert [step for step in (6, 8, 10, 11) if examine(step, 1, always)] == [8, 10]
    every = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, every=0))
    assert in_loop.with_tasks(every, start, job()).examine(6, 1, always)


def test_metrics_are_those_of_all_items_and_stand_beside_others(config, start, monkeypatch):
    limited = dataclasses.replace(config.evaluate, limit=6)
    with_tasks = in_loop.with_tasks(
        dataclasses.replace(config, evaluate=limited), start, job(examine=lambda *_: {"answers_right": 0.5})
    )
    values = with_tasks.examine(0, 7, always)
    scorer = FakeScorer(Tokenizer(config.data.tokenizer), seed=7)
    questions, _ = asking.read_questions(["quiz", "written"], Path("x"), limit=6)
    records = asking.ask(questions.task, questions.examples, scorer)
    assert values["quiz_accuracy"] == pytest.approx(sum(r["right"]["as_shown"] for r in records) / 6)
    assert values["quiz_gold_nats"] == pytest.approx(-sum(r["log_probs"][r["gold"][0]] for r in records) / 6)
    assert set(values) == {
        "answers_right", "quiz_accuracy", "quiz_accuracy_stderr", "quiz_gold_nats", "written_accuracy",
        "written_accuracy_stderr",
    }  # fmt: skip
    assert with_tasks.examine(2, 7, always) == {"answers_right": 0.5}
    monkeypatch.setattr(in_loop, "Scorer", lambda model, tokenizer: FakeScorer(tokenizer, max_length=16, seed=model))
    assert with_tasks.examine(0, 7, always)["quiz_shortened"] == 1


def test_a_run_that_is_stopping_stops_asking(config, start, monkeypatch):
    monkeypatch.setattr(in_loop, "_AT_ONCE", 4)
    told = []

    def progress(done: str) -> bool:
        told.append(done)
        return len(told) < 2

    examine = in_loop.with_tasks(config, start, job()).examine
    assert examine(0, 1, progress) is None and told[-1] == "quiz: item 14 of 20" and start.said == []
    stopped = job(examine=lambda *_: None)
    assert in_loop.with_tasks(config, start, stopped).examine(0, 1, always) is None


def test_a_figure_that_is_not_a_share_keeps_its_unit(config, start, monkeypatch):
    def bleu(judged: list[Judged]) -> dict[str, Metric]:
        return {"BLEU": Metric(23.5, 1.5, len(judged))}

    monkeypatch.setattr(asking, "find_task", lambda name: to_write(5, name=name, summarize=bleu, unit="points"))
    values = in_loop.with_tasks(config, start, job()).examine(0, 1, always)
    assert values["quiz_score"] == 23.5 and values["quiz_score_stderr"] == 1.5 and "quiz_accuracy" not in values
    assert "quiz 23.50" in start.said[0]


def test_what_cannot_be_asked_is_told_at_the_start(config, start, monkeypatch):
    with pytest.raises(ValueError, match="evaluate.tasks = .*no language model"):
        in_loop.with_tasks(config, start, job(language_model=None))
    code = dataclasses.replace(config, evaluate=EvaluateConfig(tasks=("quiz", "code"), data_dir="x"))
    with pytest.raises(ValueError, match="code is judged by running code, which a run does not do"):
        in_loop.with_tasks(code, start, job())
    for task, message in (
        (to_write(2, judge=None), "quiz needs a judge of yours"),
        (task_of(letters(5, gold=())), "quiz has answers that are not published"),
    ):
        monkeypatch.setattr(asking, "find_task", lambda name, task=task: task)
        with pytest.raises(ValueError, match=message):
            in_loop.with_tasks(config, start, job())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("quiz",), "data_dir": None}, "evaluate.data_dir = None is not valid"),
        ({"limit": -1}, "evaluate.limit = -1"),
        ({"shots": -1}, "evaluate.shots = -1"),
        ({"every": -4}, "evaluate.every = -4"),
    ],
)
def test_fields_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**changes)


def test_every_is_a_multiple_of_eval_every(config):
    with pytest.raises(ValueError, match="evaluate.every = 3 is not valid: it must be a multiple of eval_every = 2"):
        dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, every=3))
