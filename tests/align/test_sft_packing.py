"""benchmarks/sft_packing.py: both ways train on the same samples."""

from __future__ import annotations

import numpy as np

from bc2_jax.align.chat_rows import pack_best_fit
from bc2_jax.data.batch import IGNORED, Rows
from benchmarks.sft_packing import make_batches, make_samples


def segments(batches: list[Rows]) -> list[tuple[bytes, bytes, bytes]]:
    """Ids, labels and positions of every sample, in any order."""
    found = []
    for rows in batches:
        for row in zip(*(rows[name] for name in ("segment_ids", "input_ids", "labels", "positions")), strict=True):
            for segment in set(row[0].tolist()) - {0}:
                found.append(tuple(field[row[0] == segment].tobytes() for field in row[1:]))
    return sorted(found)


def test_packed_and_padded_are_the_same_samples():
    samples = make_samples(50, 64)
    packed = list(make_batches(samples, pack_best_fit([len(x) for x in samples], 64), 64))
    padded = list(make_batches(samples, [[i] for i in range(50)], 64))
    assert segments(packed) == segments(padded) and len(segments(padded)) == 50
    assert 0 < len(packed) < len(padded) == 13
    labels = np.concatenate([rows["labels"] for rows in padded])
    assert 0.5 < (labels != IGNORED).sum() / sum(map(len, samples)) < 0.65
