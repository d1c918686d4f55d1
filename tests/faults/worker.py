"""train.py that also writes the rows it trains on: the file RECORDED_ROWS has a line [step, [hash, ...]] a batch.

It is what `tests/faults/harness.py` launches. A batch is written when it is read, one step before it is trained on.
STEP_SECONDS makes each step at least so long. POISON, {data index: factor} as JSON, spoils the loss of batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from bc2_jax.train import loop
from tests.train.poisoning import poison


class RecordedIterator:
    """An iterator of batches that writes hashes of their rows."""

    def __init__(self, iterator, path: Path):
        self._iterator, self._path = iterator, path

    def __getattr__(self, name):
        return getattr(self._iterator, name)

    def __next__(self):
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        batch = next(self._iterator)
        hashes = [hashlib.sha1(row.tobytes()).hexdigest()[:12] for row in batch["input_ids"]]
        with self._path.open("a") as file:
            file.write(json.dumps([self._iterator.get_state()["next_index"], hashes]) + "\n")
        return batch


def make_recorded_iterator(loader, make=loop.make_train_iterator):
    return RecordedIterator(make(loader), Path(os.environ["RECORDED_ROWS"]))


loop.make_train_iterator = make_recorded_iterator
poison({int(index): factor for index, factor in json.loads(os.environ.get("POISON", "{}")).items()})

if __name__ == "__main__":
    train.main()
