"""train.py that also reports its phases and rows; `tests/faults/harness.py` launches it.

RECORDED_ROWS: this file gets a line [step, [hash, ...]] for each batch, when it is read, one step before it is trained
on. RECORDED_PHASES: this file gets a line `PHASE STEP` when a phase of `tests.faults.harness.PHASES` begins. HOLD_AT =
PHASE:STEP: there the thread waits to be killed, in the first such phase from STEP on. STEP_SECONDS makes each step at
least so long. POISON, {data index: factor} as JSON, spoils the loss of batches. With CLOCK_JUMPS the time of day jumps
back or forth by a day at each batch.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path


def begin(phase: str, step: int = 0) -> None:
    """Reports the start of `phase`, in a single write: a killed process leaves whole lines."""
    os.write(PHASES, f"{phase} {step}\n".encode())
    held, _, first = os.environ.get("HOLD_AT", "").partition(":")
    if phase == held and step >= int(first or 0):
        time.sleep(3600)


PHASES = os.open(os.environ["RECORDED_PHASES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
begin("start")  # before JAX is imported, if the process is one of its own

sys.path.insert(0, str(Path(__file__).parents[2]))


class JumpingClock:
    """A wall clock set by hand; replaces `time.time` before other modules import it."""

    def __init__(self):
        self.days, self._time, self._time_ns = 0, time.time, time.time_ns
        time.time, time.time_ns = self.seconds, self.nanoseconds

    def seconds(self):
        return self._time() + self.days * 86_400

    def nanoseconds(self):
        return self._time_ns() + self.days * 86_400 * 10**9


clock = JumpingClock()

# Only now, because these modules keep a reference to `time.time`.
from jax._src import compilation_cache, compiler

import train
from bc2_jax import manifest
from bc2_jax.checkpoint import Checkpointer
from bc2_jax.data import row_batches
from bc2_jax.train import distributed, loop, startup
from tests.faults.harness import hash_row
from tests.train.poisoning import poison


class RecordedIterator:
    """An iterator of batches that writes hashes of their rows."""

    def __init__(self, iterator, path: Path):
        self._iterator, self._path = iterator, path

    def __getattr__(self, name):
        return getattr(self._iterator, name)

    def __next__(self):
        begin("read", self._iterator.get_state()["next_index"])
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        if os.environ.get("CLOCK_JUMPS"):
            clock.days = (0, 1, -1)[self._iterator.get_state()["next_index"] % 3]
        batch = next(self._iterator)
        step = self._iterator.get_state()["next_index"]
        hashes = [hash_row(row) for row in batch["input_ids"]]
        with self._path.open("a") as file:
            file.write(json.dumps([step, hashes]) + "\n")
        begin("step", step)
        return batch


def make_recorded_iterator(loader, make=row_batches.make_train_iterator):
    return RecordedIterator(make(loader), Path(os.environ["RECORDED_ROWS"]))


def announce(owner, name: str, phase: str, after: str = "", step_of=lambda *_: 0) -> None:
    """Has `owner.name` say that `phase` begins when it is called, and `after` when it returns.

    `step_of` finds the step in its arguments.
    """
    function = getattr(owner, name)

    @functools.wraps(function)
    def announced(*args, **kwargs):
        step = step_of(*args)
        begin(phase, step)
        result = function(*args, **kwargs)
        if after:
            begin(after, step)
        return result

    setattr(owner, name, announced)


def keep_program(key: str, seconds: float, name: str, backend, executable, host_callbacks) -> None:
    """JAX's own function writes nothing but what process 0 compiled; on a CPU the keys of the others are their own."""
    if not host_callbacks:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))


compiler._cache_write = keep_program
row_batches.make_train_iterator = make_recorded_iterator
if "POISON" in os.environ:
    poison({int(index): factor for index, factor in json.loads(os.environ["POISON"]).items()})
announce(distributed, "start", "join")
announce(Checkpointer, "latest_good", "verify")
announce(Checkpointer, "restore", "restore")
announce(startup, "lower_train_step", "compile")
announce(Checkpointer, "save", "save", step_of=lambda self, step, *_: step)
announce(Checkpointer, "_finish", "write", "saved", step_of=lambda self, step, *_: step)
announce(manifest, "write_manifest", "seal", "rename", step_of=lambda folder: int(folder.name.split(".")[0]))
announce(loop, "fingerprint", "end")

if __name__ == "__main__":
    train.main()
