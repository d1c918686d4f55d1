"""`bc2 demo`: what is passed to pre-training, and how `--all` ends."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest

from bc2_jax.cli import demo, train
from bc2_jax.demo import program
from bc2_jax.demo.records import read_record
from bc2_jax.demo.runner import StageFailed, Stopped
from bc2_jax.demo.stage import Result, Stage


def test_without_all_it_is_the_demo_of_train(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "main", lambda argv: int(argv == ["demo", "--num-steps", "2"]) + 4)
    assert demo.main(["--num-steps", "2"]) == 5


def test_an_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert demo.main(["--all", "--stages", "chat,lunch", "--workdir", str(tmp_path / "new")]) == 1
    message = capsys.readouterr().err
    assert "'lunch'" in message and "texts, curate" in message and not (tmp_path / "new").exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("daft", "gguf") else find(name))
    assert demo.main(["--all"]) == 1
    assert "not installed: daft, gguf; pip install 'bc2_jax[data,gguf]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (StageFailed("stage 2 of 3 failed"), 1, "error: stage 2 of 3 failed"),
        (Stopped(signal.SIGTERM), 143, "continue with: bc2 demo --all --workdir 'a b'"),
        (Stopped(signal.SIGINT), 130, "stopped by SIGINT"),
    ],
)
def test_how_it_ends(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run_and_report(*args):
        raise error

    monkeypatch.setattr(program, "run_and_report", run_and_report)
    assert demo.main(["--all", "--workdir", "a b"]) == code
    assert text in capsys.readouterr().err


def test_all_writes_the_report_and_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stage = Stage("one", "One", "", (("python", "-c", "open('out', 'w')"),), ("out",), lambda _: Result(("It ran.",)))
    monkeypatch.setattr("bc2_jax.demo.stages.make_stages", lambda: [stage])
    workdir, page = tmp_path / "work", tmp_path / "docs" / "demo.md"
    assert demo.main(["--all", "--workdir", str(workdir), "--docs", str(page)]) == 0
    assert "It ran." in page.read_text() and "It ran." in (workdir / "report.html").read_text()
    assert (workdir / "report.json").is_file() and str(workdir / "report.html") in capsys.readouterr().out
    record = read_record(workdir, "one")
    assert record is not None and record.finished
