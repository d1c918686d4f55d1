"""Two starts in one workdir, processes of different runs, and failures of expendable work."""

from __future__ import annotations

import re
import shutil

from bc2_jax.data.packing import load_manifest, read_rows
from bc2_jax.train.distributed import EXIT_ERROR, EXIT_INTERRUPTED
from bc2_jax.train.metrics import read_metrics
from tests.faults import harness
from tests.faults.test_data import flip


def test_a_second_start_is_refused_and_the_live_run_goes_on(tiny, alone, tmp_path):
    """Also while a checkpoint is half-written, which the second start must not remove as a leftover."""
    every = "--checkpoint.save-every=2"
    live = harness.launch(tiny, tmp_path / "run", every, devices=2, step_seconds=1)
    for step, resume in ((0, "auto"), (3, "never")):
        live.wait_for_step(step)
        second = harness.launch(tiny, tmp_path / "run", every, f"--resume={resume}", devices=2)
        assert second.wait() == [EXIT_ERROR], second.text()
        pid = live.processes[0].pid
        assert re.search(rf"error: workdir = '{tmp_path}/run' is in use by process {pid} on ", second.log(0))
        assert "Traceback" not in second.log(0)
    assert live.wait() == [0], live.text()
    assert harness.fingerprint(live) == harness.fingerprint(alone)
    assert harness.losses(live.workdir) == harness.losses(alone.workdir)
    assert not list((live.workdir / "checkpoints").glob("*.saving*")) and not (live.workdir / ".lock").exists()


def test_two_starts_at_once_in_a_new_place(tiny, alone, tmp_path):
    jobs = [harness.launch(tiny, tmp_path / "run", devices=2, step_seconds=0.05) for _ in range(2)]
    codes = [job.wait()[0] for job in jobs]
    assert sorted(codes) == [0, EXIT_ERROR], [job.text() for job in jobs]
    winner = jobs[codes.index(0)]
    assert harness.fingerprint(winner) == harness.fingerprint(alone)
    assert "is in use by process" in jobs[codes.index(EXIT_ERROR)].log(0)


def test_processes_that_disagree_end_at_once_and_all_say_why(tiny, tmp_path):
    flags = ["--optimizer.peak-learning-rate=0.02", "--data.seed=3", "--checkpoint.save-every=7"]
    job = harness.launch(tiny, tmp_path / "run", processes=2, own_args={1: flags})
    assert job.wait() == [EXIT_ERROR] * 2, job.text()
    sentence = (
        "error: The processes of the run disagree: checkpoint.save_every is 7 on process 1 and 1000 on process 0; "
        "data.seed is 3 on process 1 and 0 on process 0; optimizer.peak_learning_rate is 0.02 on process 1 and 0.01 on "
        "process 0; start all of them with the same command, code and data."
    )
    for process in range(2):
        assert sentence in job.log(process) and "Traceback" not in job.log(process)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_fails_costs_nothing_else(tiny, whole, tokenizer, tmp_path):
    """Rows that only one process reads are damaged: all skip the evaluation, and none waits for another."""
    rows = shutil.copytree(tiny.parent / "rows", tmp_path / "rows")
    for row in read_rows(rows, "validation")[:30:5]:
        flip(rows / load_manifest(rows).validation.files[0].name, row.tobytes())
    config = harness.write_config(tmp_path, rows, tokenizer.path)
    args = ("--eval-every=7", "--eval-batches=0")
    job = harness.launch(config, tmp_path / "run", *args, processes=2, devices=2)
    assert job.wait() == [0, 0], job.text()
    assert harness.fingerprint(job) == harness.fingerprint(whole)
    assert re.search("evaluations failed (.*can't be read.*); the run continues. Failures of this kind: 4.", job.log(0))
    assert "Failures that did not end the run (see the log): evaluations 4." in job.log(0)
    metrics = read_metrics(job.workdir / "metrics.jsonl")
    assert metrics[-1]["step"] == harness.STEPS and metrics[-2]["failed_evaluations"] == 3
    assert not any("validation_loss" in line for line in metrics)


def test_metrics_that_find_no_room_do_not_end_the_run(tiny, alone, tmp_path):
    """/dev/full acts as a full disk; a file is in place of TensorBoard's folder."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").symlink_to("/dev/full")
    (workdir / "tensorboard").touch()
    job = harness.launch(tiny, workdir, devices=2)
    assert job.wait() == [0], job.text()
    assert harness.fingerprint(job) == harness.fingerprint(alone)
    assert (
        "metrics failed ([Errno 28] No space left on device); the run continues. Failures of this kind: 16."
        in job.log(0)
    )
    assert "tensorboard failed" in job.log(0) and harness.checkpoints(workdir) == [harness.STEPS]


def test_ctrl_c_saves_its_step(tiny, alone, tmp_path):
    job = harness.launch(tiny, tmp_path / "run", devices=2, step_seconds=0.1)
    job.wait_for_step(3)
    job.send(harness.signal.SIGINT, process=0)
    assert job.wait() == [EXIT_INTERRUPTED], job.text()
    (last,) = harness.checkpoints(job.workdir)
    assert last == harness.steps(job.workdir)[-1]
    assert f"Stopped by Ctrl-C: step {last} is saved in" in job.log(0) and "Traceback" not in job.log(0)
    again = harness.launch(tiny, tmp_path / "run", devices=2)
    assert again.wait() == [0], again.text()
    assert harness.fingerprint(again) == harness.fingerprint(alone)


def test_ctrl_c_to_one_of_several_processes_stops_all_with_their_step_saved(tiny, tmp_path):
    job = harness.launch(tiny, tmp_path / "run", processes=2, step_seconds=0.1)
    job.wait_for_step(3)
    job.send(harness.signal.SIGINT, process=1)
    codes = job.wait()
    (last,) = harness.checkpoints(job.workdir)
    assert codes[1] == EXIT_INTERRUPTED and last == harness.steps(job.workdir)[-1], job.text()
    for process in range(2):
        assert f"step {last} is saved in" in job.log(process)
