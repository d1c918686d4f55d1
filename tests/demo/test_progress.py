"""Progress: lines elsewhere, a bar with the time left on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from bc2_jax.demo.progress import StageProgress, format_seconds, last_line
from bc2_jax.demo.records import Record
from bc2_jax.demo.stage import Result, Stage

STAGES = [Stage(n, f"Stage {n}", "", (("python",),), (n,), lambda _: Result(), seconds=100) for n in ("a", "b", "c")]


def took(seconds: float) -> Record:
    return Record("", [{"seconds": seconds, "cpu_seconds": seconds}], finished="then")


def test_seconds():
    found = [format_seconds(seconds) for seconds in (0.4, 59, 61, 3599, 3720)]
    assert found == ["0 s", "59 s", "1:01 min", "59:59 min", "1:02 h"]


def test_last_line(tmp_path: Path):
    log = tmp_path / "log"
    log.write_bytes(b"one\n two\xff \r\n\n")
    assert last_line(log) == "two\ufffd"
    log.write_text("")
    assert last_line(log) == ""


def test_lines_where_there_is_no_terminal():
    out = io.StringIO()
    progress = StageProgress(STAGES, Console(file=out, width=100))
    with progress.shown():
        progress.begin(STAGES[0], 0)
        progress.end(STAGES[0], took(50), was_done=True)
        progress.begin(STAGES[1], 1)
        progress.end(STAGES[1], took(200), was_done=False)
    lines = out.getvalue().splitlines()
    assert lines == [
        "[1/3] Stage a", "[1/3] Stage a: already done, in 50 s", "[2/3] Stage b",
        "[2/3] Stage b: 3:20 min, 3:20 min of CPU time",
    ]  # fmt: skip


def test_time_left_follows_the_speed_of_the_stages_before(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = StageProgress(STAGES, Console(file=io.StringIO()))
    progress.begin(STAGES[0], 0)
    assert progress.seconds_left() == pytest.approx(300)
    now += 30
    assert progress.seconds_left() == pytest.approx(270)
    progress.end(STAGES[0], took(200), was_done=False)
    progress.begin(STAGES[1], 1)
    assert progress.seconds_left() == pytest.approx(400)
    now += 1000  # much later than expected: the rest is never said to be over
    assert progress.seconds_left() == pytest.approx(210)


def test_a_bar_on_a_terminal(tmp_path: Path):
    out = io.StringIO()
    log = tmp_path / "log"
    log.write_text("step 7 of 9\n")
    progress = StageProgress(STAGES, Console(file=out, width=100, force_terminal=True))
    with progress.shown():
        progress.begin(STAGES[0], 0)
        progress.working(log)
        progress.end(STAGES[0], took(1), was_done=False)
    assert "step 7 of 9" in out.getvalue() and "left" in out.getvalue()
