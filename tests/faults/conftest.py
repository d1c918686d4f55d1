"""A tiny run on packed rows, and the same run uninterrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import harness
from tests.packed_rows import pack_texts


@pytest.fixture(scope="session")
def tiny(modules, tokenizer, tmp_path_factory) -> Path:
    """The config file of a run of harness.STEPS steps."""
    folder = tmp_path_factory.mktemp("tiny")
    documents = [part for module in modules for part in module.split("\n\n") if part]
    pack_texts(documents, tokenizer, folder / "rows", 32, validation_fraction=0.02)
    return harness.write_config(folder, folder / "rows", tokenizer.path)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory) -> harness.Job:
    """Uninterrupted, two processes with two devices each."""
    job = harness.launch(tiny, tmp_path_factory.mktemp("whole") / "run", processes=2, devices=2)
    assert job.wait() == [0, 0], job.text()
    return job


@pytest.fixture(scope="session")
def alone(tiny, tmp_path_factory) -> harness.Job:
    """Uninterrupted, one process with two devices."""
    job = harness.launch(tiny, tmp_path_factory.mktemp("alone") / "run", devices=2)
    assert job.wait() == [0], job.text()
    return job


@pytest.fixture(scope="session")
def stopped(tiny, tmp_path_factory) -> harness.Job:
    """The same, after process 1 got a SIGTERM."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    job = harness.launch(tiny, workdir, processes=2, devices=2, step_seconds=0.1)
    job.wait_for_step(2)
    job.send(harness.signal.SIGTERM, process=1)
    job.wait()
    return job
