"""Sums, lengths and last values of the answers of pairs, against loops over the rows."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from bc2_jax.align.pairs import branch_last, branch_lengths, branch_sums, has_pair
from bc2_jax.data.batch import IGNORED
from bc2_jax.sharding import spec

ROWS, LENGTH, PAIRS = 8, 32, 3


def make_rows(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of up to PAIRS pairs, one in the middle of samples without branches, some cut off by the row's end."""
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    for row in segment_ids:
        place = 0
        for pair in range(1, rng.integers(0, PAIRS + 1) + 1):
            for branch in (0, 1, 2) if rng.random() < 0.8 else (0,):
                size = int(rng.integers(branch > 0, 6))
                row[place : place + size] = pair + (branch << 24)
                place += size
    labels = np.where((segment_ids > 0) & (rng.random(segment_ids.shape) < 0.6), 7, IGNORED).astype(np.int32)
    return {"segment_ids": segment_ids, "labels": labels}


def find_answers(row: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Places of the tokens of each answer, by (pair, answer) from 0."""
    found: dict[tuple[int, int], list[int]] = {}
    for place, segment in enumerate(row.tolist()):
        if segment >> 24:
            found.setdefault(((segment & 0xFFFFFF) - 1, (segment >> 24) - 1), []).append(place)
    return found


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1, 1), (2, 1, 1, 1, 4), (2, 2, 2)], ids=str)
def test_each_answer_has_its_own(mesh_of, mesh: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    batch, values = make_rows(rng), rng.normal(size=(ROWS, LENGTH)).astype(np.float32)
    expected = {name: np.zeros((ROWS, PAIRS, 2)) for name in ("sums", "lengths", "last", "there")}
    for row in range(ROWS):
        for answer, places in find_answers(batch["segment_ids"][row]).items():
            targets = [place for place in places if batch["labels"][row, place] != IGNORED]
            found = values[row, targets].astype(np.float64).sum(), len(targets), values[row, places[-1]], 1
            for name, value in zip(expected, found, strict=True):
                expected[name][(row, *answer)] = value
    assert 0 < expected["there"].mean() < 1

    @jax.jit
    def run(values, batch):
        segment_ids = batch["segment_ids"]
        total, pull = jax.vjp(lambda values: branch_sums(values, batch, PAIRS), values)
        found = total, branch_lengths(batch, PAIRS), branch_last(values, segment_ids, PAIRS)
        return *found, has_pair(segment_ids, PAIRS), pull(jax.numpy.ones_like(total))[0]

    with jax.set_mesh(mesh_of(*mesh)):
        sharding = NamedSharding(mesh_of(*mesh), spec("batch", "sequence"))
        *found, there, gradient = run(*jax.device_put((values, batch), sharding))
    for value, name in zip(found, ("sums", "lengths", "last"), strict=True):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(there, expected["there"].all(-1))
    is_used = (batch["labels"] != IGNORED) & (batch["segment_ids"] >> 24 > 0)
    np.testing.assert_array_equal(gradient, is_used)
