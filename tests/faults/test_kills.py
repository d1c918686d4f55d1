"""SIGKILL in a named phase, in which the process is held: nothing depends on who is faster.

Phases that are hit at random: test_schedule.py, and for long benchmarks/soak.py.
"""

from __future__ import annotations

import signal

from bc2_jax.train.distributed import EXIT_HUNG, EXIT_LOST
from tests.faults import harness
from tests.faults.injection import differences


def test_one_run_killed_in_every_phase(tiny, alone, tmp_path):
    """Each start resumes from the previous checkpoint; the result is that of an uninterrupted run."""
    held = ["start", "verify", "compile", "save:4", "write:4", "rename:8", "restore", "read:10", "step:12", "seal:12"]
    for phase in (*held, "end"):
        job = harness.launch(tiny, tmp_path / "run", "--checkpoint.save-every=4", devices=2, hold={0: phase})
        name, _, step = phase.partition(":")
        harness.wait_until(lambda: job.has_begun(0, name, int(step or 0)) or job.processes[0].poll() is not None, phase)  # noqa: B023  # called at once
        job.kill()
        assert job.processes[0].returncode == -signal.SIGKILL, job.text()
        assert job.has_begun(0, name, int(step or 0)), job.text()
    job = harness.launch(tiny, tmp_path / "run", "--checkpoint.save-every=4", devices=2)
    assert job.wait() == [0], job.text()
    assert f"Resumed at step {harness.STEPS}" in job.log(0)
    assert differences(tiny, harness.STEPS, job, alone) == []


def test_one_of_two_killed_while_it_reads_and_while_it_restores(tiny, whole, tmp_path):
    """The other process ends by itself, with a code that a supervisor restarts."""
    args = ("--checkpoint.save-every=4", "--distributed.heartbeat-timeout=10", "--distributed.step-timeout=20")
    for phase, step in (("read", 10), ("restore", 0)):
        hold = {1: f"{phase}:{step}"}
        job = harness.launch(tiny, tmp_path / "run", *args, processes=2, devices=2, hold=hold)
        harness.wait_until(lambda: job.has_begun(1, phase, step) and 8 in harness.checkpoints(job.workdir), job.text())  # noqa: B023  # called at once
        job.send(signal.SIGKILL, process=1)
        code, killed = job.wait()
        assert killed == -signal.SIGKILL and code in (EXIT_LOST, EXIT_HUNG, -signal.SIGABRT), job.text()
        assert harness.checkpoints(job.workdir)[-1] == 8
    job = harness.launch(tiny, tmp_path / "run", *args, processes=2, devices=2)
    assert job.wait() == [0, 0], job.text()
    assert "Resumed at step 8" in job.log(0)
    assert differences(tiny, harness.STEPS, job, whole) == []
