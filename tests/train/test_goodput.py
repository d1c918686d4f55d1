"""Wall time accounting: every moment counts once, over restarts, kills and rewinds."""

from __future__ import annotations

import json
import time

import pytest
from rich.console import Console

from bc2_jax.train.goodput import PHASES, Goodput, goodput_table, read_sessions, summarize


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass; no other time does."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 + now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def run(path, clock, start, stop, started=2.0, step_seconds=1.0):
    goodput = Goodput(path, time.monotonic() - started)
    goodput.start_step = start
    with goodput.phase("compile"):
        clock(5)
    goodput.enter("step")
    for _ in range(start, stop):
        with goodput.phase("data_wait"):
            clock(0.25)
        clock(step_seconds - 0.25)
        goodput.steps_done += 1
    return goodput


def test_every_moment_is_counted_once(clock, tmp_path):
    goodput = run(tmp_path / "g.jsonl", clock, 0, 4)
    with goodput.phase("evaluation"):
        clock(3)
        with goodput.phase("save"):
            clock(1)
        clock(1)
    clock(0.5)
    goodput.record(4)
    (session,) = read_sessions(tmp_path / "g.jsonl")
    expected = {"start": 2, "compile": 5, "data_wait": 1, "step": 3.5, "evaluation": 4, "save": 1}
    assert {k: v for k, v in session["seconds"].items() if v} == expected
    assert session["end"] - session["begin"] == sum(expected.values())
    assert summarize([session]) == dict.fromkeys(PHASES, 0.0) | expected
    metrics = goodput.metrics()
    assert metrics["goodput"] == 3.5 / 16.5 and metrics["seconds_save"] == 1 and "seconds_restore" not in metrics


def test_restarts_count_idle_time_and_repeated_steps(clock, tmp_path):
    path = tmp_path / "g.jsonl"
    first = run(path, clock, 0, 4)
    first.record(4)
    run_more = first.seconds["step"]
    clock(4)  # four more seconds of steps, then it ends at step 8
    first.steps_done += 4
    first.record(8)
    clock(100)
    # From the checkpoint of step 6: two steps are done again.
    run(path, clock, 6, 8).record(8)
    with path.open("a") as file:
        file.write('{"begin": 3, "sec')  # killed while it wrote
    sessions = read_sessions(path)
    assert [(s["start_step"], s["step"], s["steps_done"]) for s in sessions] == [(0, 8, 8), (6, 8, 2)]
    total = summarize(sessions)
    assert total["repeated"] == pytest.approx((run_more + 4) * 2 / 8)
    assert total["step"] == pytest.approx((run_more + 4) * 6 / 8 + 2 * 0.75)
    assert total["idle"] == pytest.approx(100 - 2)  # the second began two seconds before `run`
    assert sum(total.values()) == pytest.approx(sessions[-1]["end"] - sessions[0]["begin"])
    console = Console(width=120, record=True, quiet=False)
    console.print(goodput_table(sessions))
    text = console.export_text()
    assert "idle" in text and "all 2 session(s)" in text and "restore" not in text


def test_steps_after_a_rewind_are_repeated(clock, tmp_path):
    goodput = run(tmp_path / "g.jsonl", clock, 0, 12)  # 12 steps done to come to step 9
    goodput.record(9)
    total = summarize(read_sessions(tmp_path / "g.jsonl"))
    assert total["repeated"] == pytest.approx(3 * 0.75) and total["step"] == pytest.approx(9 * 0.75)


def test_a_clock_set_back_gives_no_negative_time(clock, tmp_path):
    lines = [{"begin": b, "end": b + 10, "start_step": 0, "step": 0, "steps_done": 0, "seconds": {"other": 10.0}}
             for b in (100.0, 50.0)]  # fmt: skip
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    total = summarize(read_sessions(tmp_path / "g.jsonl"))
    assert total["idle"] == 0 and total["other"] == 20
