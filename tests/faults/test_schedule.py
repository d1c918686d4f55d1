"""Random schedules of faults: whatever they are, the run ends like an uninterrupted one."""

from __future__ import annotations

import json
import shutil

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.faults import harness
from tests.faults.injection import DAMAGES, Damage, Fault, Start, differences, run

faults = st.builds(
    Fault,
    kind=st.sampled_from(["kill", "kill", "terminate"]),
    victim=st.just(0),
    phase=st.sampled_from(harness.PHASES),
    step=st.integers(1, harness.STEPS - 5),
    delay=st.floats(0, 0.1),
)
damages = st.lists(st.builds(Damage, kind=st.sampled_from(DAMAGES), where=st.integers(0, 1 << 30)), max_size=2)


# Failing examples are not shrunk: each takes seconds, and the message describes it.
@settings(max_examples=2, phases=[Phase.generate])
@given(schedule=st.lists(st.tuples(faults, damages), min_size=2, max_size=3), last=damages)
def test_any_schedule_ends_like_the_run_without_faults(tiny, alone, tmp_path_factory, schedule, last):
    left = list(schedule)

    def next_start(record, good):
        fault, damaged = left.pop(0) if left else (None, last)
        return Start(1, 2, fault=fault, damages=tuple(damaged))

    workdir = tmp_path_factory.mktemp("schedule") / "run"
    record = run(tiny, workdir, ("--checkpoint.save-every=3",), next_start, step_seconds=0.02)
    assert record.problems == [] and record.unprovoked == 0, record.last.text()
    assert all(event.is_survived for event in record.events)
    assert all(event.is_detected for event in record.events if event.kind in DAMAGES)
    assert differences(tiny, harness.STEPS, record.last, alone) == []


def test_differences_are_seen(tiny, alone, whole, tmp_path):
    """Other numbers of devices change only bits; lost, repeated and moved rows are counted."""
    bits = differences(tiny, harness.STEPS, whole, alone)
    assert "fingerprints of the parameters differ" in bits and any("opt_state" in difference for difference in bits)
    assert differences(tiny, harness.STEPS, whole, alone, rtol=1e-4) == []
    shutil.copytree(alone.workdir.parent, tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("*.rows")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    copy = harness.Job(tmp_path / "copy/run", [], [tmp_path / "copy" / alone.logs[0].name])
    for change, expected in {
        "lost": ["1 rows are lost"],
        "again": ["1 rows are repeated or of another step"],
        "moved": ["12 rows are lost", "12 rows are repeated or of another step"],
    }.items():
        changed = [[step, list(hashes)] for step, hashes in lines]
        if change == "lost":
            changed[3][1].pop()
        elif change == "again":
            changed[3][1].append(changed[2][1][0])
        else:
            changed[3][0] = harness.STEPS + 1
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))
        assert differences(tiny, harness.STEPS, copy, alone) == expected
