"""Batches of few shapes with little padding, in which every request has its places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B
from bc2_jax.data.batch import IGNORED
from bc2_jax.evaluate.batching import LONGEST_ROW, Item, Shapes, make_batches
from bc2_jax.kernels.segments import can_see, positions_of


def make_items(count: int, shots: int, question: int, labels: int, seed: int = 0) -> list[Item]:
    rng = np.random.default_rng(seed)
    head = rng.integers(3, 1000, shots)
    items = []
    for _ in range(count):
        fed = np.concatenate([head, rng.integers(3, 1000, rng.integers(1, 2 * question))]).astype(np.int32)
        items += [Item(fed, np.array([letter], np.int32), 0) for letter in range(labels)]
    return items


def test_rows_are_long_where_much_is_shared_and_short_where_nothing_is():
    shared = Shapes(BAICHUAN2_7B, None, None, 1, 1).plan(make_items(500, 800, 100, 4))
    assert shared.length == LONGEST_ROW
    alone = Shapes(BAICHUAN2_7B, None, None, 1, 1).plan(make_items(300, 0, 300, 1))
    assert alone.length < 4096
    few = Shapes(BAICHUAN2_7B, None, None, 1, 1)
    plan = few.plan(make_items(2, 10, 10, 4))
    assert (plan.length, few.rows_of(plan)) == (64, 1)


def test_a_length_that_is_compiled_is_preferred():
    shapes = Shapes(BAICHUAN2_7B, None, None, 1, 1)
    lengths = {shapes.plan(make_items(200, shots, 80, 4, seed)).length for seed, shots in enumerate((500, 600, 450))}
    assert len(lengths) == 1


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 3), st.sampled_from([(None, 1, 1), (3, 2, 4)]))
def test_every_request_has_its_places(count, shots, labels, shape):
    rows, batch_parts, sequence_parts = shape
    items = make_items(count, shots, 10, labels)
    shapes = Shapes(BAICHUAN2_7B, rows, None, batch_parts, sequence_parts)
    seen = []
    for batch in make_batches(shapes.plan(items), items, shapes):
        ids, segments, places, wanted = batch.rows
        assert (
            ids.shape[0] % batch_parts == 0 and ids.shape[1] % sequence_parts == places.shape[1] % sequence_parts == 0
        )
        positions = np.asarray(positions_of(segments))
        for number, row, first in batch.slots:
            fed, label, _ = items[number]
            assert wanted[row, first : first + len(label)].tolist() == label.tolist()
            place = places[row, first + len(label) - 1]
            sees = can_see(segments[row, place], segments[row, : place + 1])
            assert ids[row, : place + 1][sees].tolist() == fed.tolist()
            assert positions[row, : place + 1][sees].tolist() == list(range(len(fed)))
            seen.append(number)
        assert (wanted != IGNORED).sum() == sum(len(items[slot.item].labels) for slot in batch.slots)
    assert sorted(seen) == list(range(len(items)))


@pytest.mark.parametrize(("needed", "places"), [(1, 64), (65, 128), (256, 256), (257, 512)])
def test_places_are_powers_of_two(needed, places):
    assert Shapes(BAICHUAN2_7B, None, None, 1, 1).places_of(needed) == places
