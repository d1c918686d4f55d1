"""What the report says of the stages: figures from the files of the programs, claims from their standard errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bc2_jax.demo import reading


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_run(workdir: Path, name: str, metrics: list[dict[str, Any]], config: dict[str, Any]) -> None:
    write(workdir / name / "config.json", config)
    (workdir / name / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics), encoding="utf-8")


@pytest.mark.parametrize(
    ("before", "after", "claim"),
    [(0.0, 0.5, "more than two"), (0.4, 0.5, "no difference can be claimed"), (0.5, 0.3, "more than two")],
)
def test_a_change_is_claimed_only_beyond_two_standard_errors(before: float, after: float, claim: str):
    assert claim in reading.describe_change(before, after, 100)


def test_questions_before_and_after(tmp_path: Path):
    metrics = [
        {
            "step": step,
            "validation_answers_right": right,
            "validation_answers_ended": 1.0,
            "validation_cross_entropy": loss,
        }
        for step, right, loss in ((0, 0.0, 6.5), (60, 0.3, 3.0), (120, 0.4, 2.5))
    ]
    write_run(tmp_path, "chat", [{"step": 1, "loss": 3.0}, *metrics], {"questions": {"limit": 100}})
    result = reading.read_chat(tmp_path)
    (table,) = result.tables
    assert table.headers == ("", "step 0", "step 120")
    assert ("right answers", "0%", "40%") in table.rows and table.rows[0][1:] == ("6.500", "2.500")
    assert "more than two standard errors" in result.sentences[0]


def test_a_run_without_evaluations_is_an_error(tmp_path: Path):
    write_run(tmp_path, "base", [{"step": 1, "loss": 3.0}], {"model": {"vocab_size": 4096}})
    with pytest.raises(ValueError, match="validation_cross_entropy"):
        reading.read_base(tmp_path)


def test_benchmarks_near_and_far_from_a_guess(tmp_path: Path):
    def results(value: float) -> dict[str, Any]:
        metrics = {"as_shown": {"value": value, "stderr": 2.5, "items": 290}}
        answers = {"as_shown": {"A": 200, "C": 90}, "gold": {"A": 290}}
        return {"title": "MMLU", "task": "mmlu", "headline": "as_shown", "metrics": metrics, "answers": answers}

    difference = {"task": "mmlu", "difference": 1.0, "low": -3.0, "high": 5.0, "p": 0.7}
    write(tmp_path / "evals" / "base_rl" / "compare.json", {"tasks": [difference]})
    write(tmp_path / "evals" / "base" / "mmlu" / "results.json", results(24.0))
    write(tmp_path / "evals" / "rl" / "mmlu" / "results.json", results(25.0))
    result = reading.read_evaluation(tmp_path)
    assert "every figure is within two standard errors" in result.sentences[0]
    assert result.tables[0].rows[1] == ("rl", "MMLU", "290", "25.0 %", "2.5", "A 200 C 90")
    assert result.tables[1].rows == (("mmlu", "+1.0", "-3.0 to +5.0", "0.70"),)
    write(tmp_path / "evals" / "rl" / "mmlu" / "results.json", results(35.0))
    assert (
        "more than two standard errors from that: rl in MMLU (35.0 %)" in reading.read_evaluation(tmp_path).sentences[0]
    )


def test_scaling(tmp_path: Path):
    runs = [{"name": name, "C": 10.0**i, "loss": 5.0 - i / 10} for i, name in enumerate("abcd")]
    held = {"predicted": 4.71, "actual": 4.7, "error": 4.71 / 4.7 - 1}
    write(tmp_path / "scaling" / "scaling.json", {"runs": runs, "largest_left_out": held})
    result = reading.read_scaling(tmp_path)
    assert "4.7100" in result.sentences[0] and "+0.21% off" in result.sentences[0]
    assert "+2.13% off" in result.sentences[0]  # the model before it
    assert [row[0] for row in result.tables[0].rows] == list("abcd")


def test_rewards_by_what_is_wrong(tmp_path: Path):
    def accuracy(value: float, low: float) -> dict[str, Any]:
        return {"pairs": 200, "value": value, "low": low, "high": 0.9}

    gaps = {"1": accuracy(0.9, 0.8), "5": accuracy(0.5, 0.4)}
    write(tmp_path / "reward_report.json", {"overall": accuracy(0.6, 0.53), "by_gap": gaps})
    result = reading.read_reward(tmp_path)
    assert "better than a guess" in result.sentences[0]
    assert result.tables[0].rows[1][0] == "the other answer: repeats itself (gap 1)"
    write(tmp_path / "reward_report.json", {"overall": accuracy(0.52, 0.45), "by_gap": gaps})
    assert "cannot be told from a guess" in reading.read_reward(tmp_path).sentences[0]


def test_answers_of_the_server(tmp_path: Path):
    answer = {"question": "a\nb", "expected": "1", "answer": "2", "seconds": 0.5}
    record = {"seconds_until_ready": 9.6, "stream_is_the_same": True, "answers": [answer]}
    write(tmp_path / "answers.json", record)
    result = reading.read_answers(tmp_path)
    assert result.tables[0].rows == (("a b", "1", "2", "0.50 s"),) and "after 10 s" in result.sentences[0]
    write(tmp_path / "answers.json", record | {"stream_is_the_same": False})
    assert "ANOTHER ONE" in reading.read_answers(tmp_path).sentences[0]


def test_samples_of_the_log():
    log = "x\n--- 'old' continues:\nold\n---\n$ again\n"
    log += "--- '却说' continues:\nline one\nline two\n--- 'def ' continues:\nf():\n---\nend"
    assert reading.read_samples(log) == {"却说": "line one\nline two", "def ": "f():"}
    assert reading.read_samples("nothing") == {}
