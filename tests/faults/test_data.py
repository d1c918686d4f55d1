"""Whole runs whose data is missing, shrinks or is damaged, that are killed while they read, and whose clock jumps.

Damage to any byte of any file: tests/data/test_row_file.py.
"""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.data.loader import make_train_loader
from bc2_jax.data.packing import load_manifest, read_rows
from bc2_jax.train.distributed import EXIT_ERROR, EXIT_LOST, EXIT_PREEMPTED
from bc2_jax.train.metrics import read_metrics
from tests.faults import harness

ENDS = (EXIT_ERROR, EXIT_LOST, -signal.SIGABRT)
"""Exit codes of a process with an error, or whose peer has one."""


@pytest.fixture
def rows(tiny, tmp_path) -> Path:
    """A copy of the rows of the tiny run, for damage."""
    return shutil.copytree(tiny.parent / "rows", tmp_path / "rows")


@pytest.fixture
def config(rows, tokenizer) -> Path:
    """The tiny run on them."""
    return harness.write_config(rows.parent, rows, tokenizer.path)


def files(rows: Path, split: str = "train") -> list[Path]:
    return [rows / info.name for info in load_manifest(rows).split(split).files]


def flip(path: Path, record: bytes) -> None:
    """Changes a bit in the only place of `path` that has `record`."""
    content = bytearray(path.read_bytes())
    assert content.count(record) == 1
    content[content.index(record) + len(record) // 2] ^= 4
    path.write_bytes(content)


def damage_row_of_step(rows: Path, tokenizer, step: int) -> tuple[int, str]:
    """Flips a bit in a row that the run reads in that step, from 1 on; its number and its hash."""
    data = DataConfig(
        sources=(SourceConfig(path=str(rows)),), tokenizer=str(tokenizer.path), sequence_length=32, global_batch_size=12
    )
    batch = make_train_loader(data, process_index=0, process_count=1)[step - 1]["input_ids"]
    stored = read_rows(rows, "train")
    for row in batch:
        (found,) = np.nonzero((stored[:, :-1] == row).all(axis=1))
        if len(found) == 1:
            flip(files(rows)[0], stored[found[0]].tobytes())
            return int(found[0]), harness.hash_row(row)
    raise AssertionError("No row of the step stands in the file once.")


def sentences(job: harness.Job) -> list[str]:
    """Log lines of the processes about unreadable rows."""
    return [line for i in range(len(job.logs)) for line in job.log(i).splitlines() if "can't be read" in line]


def test_a_missing_file_and_a_bad_row_end_the_run_in_one_sentence(config, rows, tokenizer, tmp_path):
    row, _ = damage_row_of_step(rows, tokenizer, 8)
    bad = harness.launch(config, tmp_path / "bad", "--distributed.heartbeat-timeout=10", processes=2)
    gone = shutil.copytree(rows, tmp_path / "gone")
    files(gone)[0].unlink()
    missing = harness.launch(config, tmp_path / "missing", f"--data.sources.0.path={gone}", processes=2)
    assert missing.wait() == [EXIT_ERROR] * 2, missing.text()
    for process in range(2):
        expected = f"error: data.sources.path = '{gone}' is incomplete: {files(gone)[0].name} is missing."
        assert missing.log(process).count(expected) == 1
    assert not (tmp_path / "missing").exists()

    codes = bad.wait()
    (line,) = sentences(bad)  # of the one process that reads the row
    process = next(i for i in range(2) if line in bad.log(i))
    assert codes[process] == EXIT_ERROR and codes[1 - process] in ENDS, bad.text()
    assert line.startswith(f"error: row {row} of '{files(rows)[0]}' can't be read (Corrupted")
    assert line.endswith("data.max_bad_rows = 0 allows no more.")
    assert harness.steps(bad.workdir)[-1] < 8


def test_bad_rows_are_padding_and_the_killed_run_goes_on(config, rows, tokenizer, whole, tmp_path):
    """A training row and a held-out one; rows read as uninterrupted, but for the bad one."""
    row, lost = damage_row_of_step(rows, tokenizer, 8)
    flip(files(rows, "validation")[0], read_rows(rows, "validation")[1].tobytes())
    arguments = ("--checkpoint.save-every=2", "--data.max-bad-rows=2")
    job = harness.launch(config, tmp_path / "run", *arguments, devices=2, step_seconds=0.1)
    harness.wait_until(lambda: 10 in harness.checkpoints(job.workdir), job.text())
    job.send(signal.SIGKILL, process=0)  # it sleeps most of the time, about to read
    assert job.wait() == [-signal.SIGKILL]
    again = harness.launch(config, tmp_path / "run", *arguments, devices=2)
    assert again.wait() == [0], again.text()

    named = [f"row {row} of '{files(rows)[0]}'", f"row 1 of '{files(rows, 'validation')[0]}'"]
    for name in named:
        assert len([line for line in sentences(job) if name in line]) == 1, job.text()
    (line,) = sentences(again)
    assert named[1] in line, "evaluated at the end alone"
    padding = harness.hash_row(np.zeros(32, np.int32))
    read, expected = harness.rows_read(again.workdir), harness.rows_read(whole.workdir)
    assert sorted(expected[8]) == sorted([*(set(read[8]) - {padding}), lost]) and padding in read[8]
    assert {step: r for step, r in read.items() if step != 8} == {s: r for s, r in expected.items() if s != 8}
    counts = {line["step"]: line.get("bad_rows") for line in read_metrics(again.workdir / "metrics.jsonl")}
    assert counts[0] == counts[1] == 1.0 and counts[8] == counts[9] == 2.0, "of the first process"
    assert counts[harness.STEPS - 1] is None and counts[harness.STEPS] == 1.0, "of the second"


def test_a_file_that_shrinks_while_the_run_reads_ends_it_and_nothing_is_lost(config, rows, whole, tmp_path):
    workdir = tmp_path / "run"
    job = harness.launch(
        config, workdir, "--checkpoint.save-every=2", "--distributed.heartbeat-timeout=10", processes=2, devices=2,
        step_seconds=0.1,
    )  # fmt: skip
    job.wait_for_step(5)
    path = files(rows)[0]
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(content) // 2)
    codes = job.wait()
    assert EXIT_ERROR in codes and set(codes) <= set(ENDS), job.text()
    pattern = rf"error: row \d+ of '{re.escape(str(path))}' can't be read \(.*\): the file is damaged, .* no more\."
    assert sentences(job) and all(re.fullmatch(pattern, line) for line in sentences(job)), job.text()
    path.write_bytes(content)
    again = harness.launch(config, workdir, processes=2, devices=2)
    assert again.wait() == [0, 0], again.text()
    assert int(re.findall(r"Resumed at step (\d+)", again.log(0))[0]) >= 4
    assert harness.rows_read(workdir) == harness.rows_read(whole.workdir)
    assert harness.losses(workdir) == harness.losses(whole.workdir)
    assert harness.fingerprint(again) == harness.fingerprint(whole)


def test_a_clock_that_jumps_changes_timestamps_alone(tiny, whole, tmp_path, monkeypatch):
    """The time of day, by a day, back and forth at each step, until a SIGTERM; the watchdog is on."""
    monkeypatch.setenv("CLOCK_JUMPS", "1")
    workdir = tmp_path / "run"
    job = harness.launch(
        tiny, workdir, "--checkpoint.save-every=4", "--distributed.step-timeout=60", processes=2, devices=2,
        step_seconds=0.1,
    )  # fmt: skip
    job.wait_for_step(8)
    job.send(signal.SIGTERM, process=0)
    assert job.wait() == [EXIT_PREEMPTED] * 2, job.text()
    last = harness.steps(workdir)[-1]
    assert harness.steps(workdir) == list(range(last + 1))
    assert harness.checkpoints(workdir) == sorted({*range(4, last + 1, 4), last})
    read, expected = harness.rows_read(workdir), harness.rows_read(whole.workdir)
    assert all(read[step] == expected[step] for step in range(1, last + 1))
    assert harness.losses(workdir) == {s: x for s, x in harness.losses(whole.workdir).items() if s <= last}
    seconds = [line["step_seconds"] for line in read_metrics(workdir / "metrics.jsonl") if "step_seconds" in line]
    assert len(seconds) == last and all(0 < s < 3600 for s in seconds)
