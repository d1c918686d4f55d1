"""Which checkpoints of a run are evaluated, and what is drawn of them."""

from __future__ import annotations

import pytest

from bc2_jax.evaluate import curve
from bc2_jax.evaluate.records import write_json
from bc2_jax.terminal import make_console
from bc2_jax.train.milestones import Milestone


@pytest.fixture
def run(monkeypatch, tmp_path):
    found = [
        Milestone(n, tmp_path / str(n), n * 10, None, None, n == 2, "4 is damaged." if n == 4 else None)
        for n in (1, 2, 3, 4)
    ]
    monkeypatch.setattr(curve, "list_milestones", lambda run: found)
    return tmp_path


def test_checkpoints_are_chosen(run):
    for which, steps in (("all", [1, 2, 3]), ("permanent", [2]), ("3,1", [1, 3])):
        assert [milestone.step for milestone in curve.choose_checkpoints(run, which)] == steps
    for which, message in (
        ("5", "has checkpoints of 1, 2, 3, 4"), ("4", "4 is damaged"), ("last", "it must be all, permanent, or steps"),
        ("1,", "it must be all"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            curve.choose_checkpoints(run, which)


def test_all_that_was_evaluated_is_drawn_in_order(tmp_path, capsys):
    settings = {"checksum": "c", "tokenizer_sha256": "t", "dtype": "float32", "max_length": 256}
    for step in (20, 3, 100):
        folder = tmp_path / f"step_{step}"
        about = settings | {"model": "m", "files": "f", "step": step, "tokens": step * 1000, "tasks": {}}
        write_json(folder / "evaluation.json", about)
        metric = {"value": 25.0 + step / 10, "stderr": None if step == 3 else 1.5, "items": 9}
        results = {"task": "quiz", "title": "Quiz", "headline": "acc", "unit": "percent", "items": 9}
        write_json(folder / "quiz" / "results.json", results | {"metrics": {"acc": metric}})
        (folder / "quiz" / "records.jsonl").write_text("")
    write_json(tmp_path / "step_7" / "evaluation.json", about | {"step": 7})  # has no results yet
    points = curve.read_points(tmp_path)
    assert [(point.step, point.tokens) for point in points] == [(3, 3000), (20, 20000), (100, 100000)]
    curve.print_curve(make_console(), points)
    out = capsys.readouterr().out
    assert "25.30" in out and "27.00 ± 1.50" in out and out.index("25.30") < out.index("35.00")
    curve.plot_curve(tmp_path / "curve.png", points)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert curve.find_breaks(points) == []
    points[2].tasks["quiz"]["items"] = 5
    assert curve.find_breaks(points) == [
        "quiz: the points differ in more than the checkpoint (acc of 9 items at step 3, 20; acc of 5 items at step "
        "100); evaluate all alike."
    ]
    assert curve.as_json(points)[1]["quiz"] == {"metric": "acc", "value": 27.0, "stderr": 1.5, "items": 9}
