"""Several real processes: changed numbers, one killed, one that hangs, one with wrong arguments."""

from __future__ import annotations

import re
import shutil
import signal

import pytest

from bc2_jax.train.distributed import EXIT_ERROR, EXIT_HUNG, EXIT_LOST
from tests.faults import harness


def test_goes_on_with_other_numbers_of_processes(tiny, whole, stopped, tmp_path):
    """2 x 2 devices -> 4 x 1, heads cut as well -> 3 x 1: the same rows, the same losses but for rounding."""
    workdir = shutil.copytree(stopped.workdir.parent, tmp_path / "copy") / "run"
    start = harness.checkpoints(workdir)[-1]
    four = harness.launch(tiny, workdir, f"--num-steps={start + 2}", "--mesh.tensor=2", processes=4)
    assert four.wait() == [0] * 4, four.text()
    three = harness.launch(tiny, workdir, "--mesh.data=3", processes=3)
    assert three.wait() == [0] * 3, three.text()
    assert f"Resumed at step {start + 2}" in three.log(0)
    rows, expected = harness.rows_read(workdir), harness.rows_read(whole.workdir)
    assert list(rows) == list(range(1, harness.STEPS + 1)) and {len(hashes) for hashes in rows.values()} == {12}
    assert rows == expected
    assert harness.losses(workdir) == pytest.approx(harness.losses(whole.workdir), rel=1e-4)


def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(tiny, whole, tmp_path):
    job = harness.launch(
        tiny,
        tmp_path / "run",
        "--checkpoint.save-every=2",
        "--distributed.heartbeat-timeout=10",
        processes=2,
        devices=2,
        step_seconds=0.1,
    )
    job.wait_for_step(7)
    job.send(signal.SIGKILL, process=1)
    code, killed = job.wait()
    assert killed == -signal.SIGKILL and code in (EXIT_LOST, -signal.SIGABRT), job.text()
    assert "error" in job.log(0).lower()
    again = harness.launch(tiny, tmp_path / "run", devices=4)
    assert again.wait() == [0], again.text()
    assert int(re.findall(r"Resumed at step (\d+)", again.log(0))[0]) in (2, 4, 6, 8)
    assert harness.rows_read(job.workdir) == harness.rows_read(whole.workdir)
    assert harness.losses(job.workdir) == pytest.approx(harness.losses(whole.workdir), rel=1e-4)


def test_a_hanging_collective_ends_with_a_diagnosis(tiny, tmp_path):
    job = harness.launch(
        tiny, tmp_path / "run", "--distributed.step-timeout=20", "--num-steps=1000", processes=2, step_seconds=0.05
    )
    job.wait_for_step(2)
    job.send(signal.SIGSTOP, process=1)
    harness.wait_until(lambda: job.processes[0].poll() is not None, job.text(), 120)
    job.kill()
    assert job.processes[0].returncode == EXIT_HUNG, job.text()
    last = job.log(0).splitlines()[-1]
    step = harness.steps(job.workdir)[-1]
    assert re.match(rf"error: process 0 of 2 hangs: no progress for \d+ s after step {step} ", last), last
    assert "loop.py" in job.log(0), "where it hangs"


def test_an_error_that_all_find_ends_all(tiny, stopped):
    job = harness.launch(tiny, stopped.workdir, "--num-steps=1", processes=2, devices=2)
    assert job.wait() == [EXIT_ERROR] * 2, job.text()
    assert all("error: num_steps = 1 is not valid" in job.log(process) for process in range(2))
