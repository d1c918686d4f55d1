"""SIGTERM: the step is finished and saved, and the resumed run is the same as an uninterrupted one.

One process alone: tests/train/test_loop.py.
"""

from __future__ import annotations

import re
import shutil

from bc2_jax.train.distributed import EXIT_PREEMPTED
from tests.faults import harness


def test_a_signal_to_one_process_stops_all_at_the_same_step(stopped):
    assert [process.returncode for process in stopped.processes] == [EXIT_PREEMPTED] * 2, stopped.text()
    last = harness.steps(stopped.workdir)[-1]
    assert 2 <= last < harness.STEPS
    assert harness.checkpoints(stopped.workdir) == [last]
    for process in range(2):
        assert re.findall(r"Stopped by SIGTERM: step (\d+) is saved", stopped.log(process)) == [str(last)]


def test_several_processes_go_on_bit_for_bit(tiny, whole, stopped, tmp_path):
    workdir = shutil.copytree(stopped.workdir.parent, tmp_path / "copy") / "run"
    job = harness.launch(tiny, workdir, processes=2, devices=2)
    assert job.wait() == [0, 0], job.text()
    assert harness.losses(workdir) == harness.losses(whole.workdir)
    assert harness.rows_read(workdir) == harness.rows_read(whole.workdir)
    assert harness.fingerprint(job) == harness.fingerprint(whole)


def test_a_signal_before_the_first_step_of_a_resumed_run_stops_it(tiny, stopped, tmp_path):
    workdir = shutil.copytree(stopped.workdir.parent, tmp_path / "copy") / "run"
    start = harness.checkpoints(workdir)[-1]
    job = harness.launch(tiny, workdir, processes=2, devices=2, step_seconds=0.2)
    harness.wait_until(lambda: job.has_begun(1, "compile"), job.text())
    job.send(harness.signal.SIGTERM, process=1)
    assert job.wait() == [EXIT_PREEMPTED] * 2, job.text()
    assert harness.checkpoints(workdir)[-1] == harness.steps(workdir)[-1] < start + 5
