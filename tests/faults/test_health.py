"""Several processes make the same decision on a loss that is not finite and on a spike."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests.faults import harness

FACTORS = {3: math.nan, 12: 100.0, 13: 100.0, 24: math.nan, 25: math.nan}
FLAGS = [
    "--health.max-skipped-updates=1", "--health.spike-deviations=50", "--health.spike-steps=2",
    "--health.spike-window=4", "--checkpoint.save-every=5", "--num-steps=30",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> list[harness.Job]:
    """The same run with the same batches spoilt: two processes with two devices each, and one with four."""
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POISON", json.dumps(FACTORS))
        for processes, devices in ((2, 2), (1, 4)):
            folder = tmp_path_factory.mktemp(f"spoilt{processes}")
            jobs.append(harness.launch(tiny, folder / "run", *FLAGS, processes=processes, devices=devices))
    for job in jobs:
        job.wait()
    return jobs


def events(job: harness.Job) -> list[dict]:
    lines = (job.workdir / "health.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in ("time", "losses")} for line in lines]


def test_they_decide_as_one_process_does(runs):
    several, one = runs
    # Steps 13 and 14 are high; without batches 11, 12, 13 the last two are those of steps 22 and 23.
    assert events(several) == events(one) == [
        {"event": "skipped update", "step": 4, "in_a_row": 1},
        {"event": "rewind", "step": 14, "to": 10, "skipped_rows": [132, 168], "rows": 36},
        {"event": "skipped update", "step": 22, "in_a_row": 1},
        {"event": "stopped", "step": 23, "metric": "loss", "in_a_row": 2},
    ]  # fmt: skip
    assert [p.returncode for p in several.processes] == [1, 1] and one.processes[0].returncode == 1
    for log in (several.log(0), several.log(1), one.log(0)):
        assert "loss is nan at step 23: the run stops; the last good checkpoint is" in log and "Traceback" not in log
    assert harness.checkpoints(several.workdir) == harness.checkpoints(one.workdir) == [5, 10, 15, 20]
    a, b = harness.losses(several.workdir), harness.losses(one.workdir)
    assert list(a) == list(b) == list(range(1, 23))
    np.testing.assert_allclose(np.array([*a.values()], float), np.array([*b.values()], float), rtol=1e-4)


def test_each_process_leaves_its_rows(runs):
    several, one = runs
    with np.load(one.workdir / "bad_batch_step_23.npz") as file:
        whole = dict(file)
    parts = [np.load(several.workdir / f"bad_batch_step_23_process_{p}.npz") for p in range(2)]
    assert sorted(map(bytes, np.concatenate([p["input_ids"] for p in parts]))) == sorted(map(bytes, whole["input_ids"]))
    assert whole["first_row"] == parts[0]["first_row"] == 25 * 12
