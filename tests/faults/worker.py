"""train.py that also writes the rows it trains on: the file RECORDED_ROWS has a line [step, [hash, ...]] a batch.

It is what `tests/faults/harness.py` launches. A batch is written when it is read, one step before it is trained on.
STEP_SECONDS makes each step at least so long. POISON, {data index: factor} as JSON, spoils the loss of batches. With
CLOCK_JUMPS the time of day jumps back or forth by a day at each batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


class JumpingClock:
    """The time of day, set by hand; in place of `time.time` before anyone takes that."""

    def __init__(self):
        self.days, self._time, self._time_ns = 0, time.time, time.time_ns
        time.time, time.time_ns = self.seconds, self.nanoseconds

    def seconds(self):
        return self._time() + self.days * 86_400

    def nanoseconds(self):
        return self._time_ns() + self.days * 86_400 * 10**9


clock = JumpingClock()

import train  # noqa: E402
from bc2_jax.train import loop  # noqa: E402
from tests.faults.harness import hash_row  # noqa: E402
from tests.train.poisoning import poison  # noqa: E402


class RecordedIterator:
    """An iterator of batches that writes hashes of their rows."""

    def __init__(self, iterator, path: Path):
        self._iterator, self._path = iterator, path

    def __getattr__(self, name):
        return getattr(self._iterator, name)

    def __next__(self):
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        if os.environ.get("CLOCK_JUMPS"):
            clock.days = (0, 1, -1)[self._iterator.get_state()["next_index"] % 3]
        batch = next(self._iterator)
        hashes = [hash_row(row) for row in batch["input_ids"]]
        with self._path.open("a") as file:
            file.write(json.dumps([self._iterator.get_state()["next_index"], hashes]) + "\n")
        return batch


def make_recorded_iterator(loader, make=loop.make_train_iterator):
    return RecordedIterator(make(loader), Path(os.environ["RECORDED_ROWS"]))


loop.make_train_iterator = make_recorded_iterator
if "POISON" in os.environ:
    poison({int(index): factor for index, factor in json.loads(os.environ["POISON"]).items()})

if __name__ == "__main__":
    train.main()
