"""Requests -> batches of rows of few shapes, and where each request's scores are in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.evaluate.sharing import Plan, find_leaves, plan_rows
from bc2_jax.infer.generate import bucket
from bc2_jax.infer.score import Rows, empty_rows
from bc2_jax.kernels.segments import TRUNK_BITS

LONGEST_ROW = 8192
"""Tokens of a row, unless a request needs more."""
TOKENS_AT_ONCE = 8192
"""Tokens of a batch on each device that has rows of its own."""
FEWEST_PLACES = 64
"""Scored in a row, at least, so that few programs are compiled."""
ATTENTION_COST = 1.0
"""Time of attention beside that of the same number of multiplications in the layers' matmuls, were it to look at every
earlier token of the row: its softmax costs more, and blocks of other branches are left out."""
NEW_SHAPE_COST = 1.25
"""How much slower than a row length that was used before a new one may be estimated: it must be compiled."""


class Item(NamedTuple):
    """A request as the model is fed: int32 arrays."""

    fed: np.ndarray
    labels: np.ndarray
    """The tokens to score: those that follow on the last len(labels) of `fed`."""
    cut: int
    """Tokens left out in front of `fed`."""


class Slot(NamedTuple):
    """Where the scores of an item are: places first..first + len(labels) - 1 of a row."""

    item: int
    row: int
    first: int


class Batch(NamedTuple):
    rows: Rows
    slots: list[Slot]


@dataclasses.dataclass
class Shapes:
    """Chooses the shapes of batches, so that little is wasted and few are compiled."""

    config: ModelConfig
    rows: int | None
    """Of a batch; None where they are chosen."""
    row_length: int | None
    """As `rows`."""
    batch_parts: int
    """Rows of a batch are a multiple of this, columns and places of `sequence_parts`."""
    sequence_parts: int
    used: set[int] = dataclasses.field(default_factory=set)
    """Row lengths that were chosen before."""

    def plan(self, items: Sequence[Item]) -> Plan:
        """The rows that are expected to take the least time.

        Long rows share their trunks among more requests; in short ones attention costs less.
        """
        leaves = find_leaves([item.fed for item in items])
        longest = max(map(len, leaves.ids))
        if self.row_length is not None:
            return plan_rows(leaves, self._fit(max(self.row_length, longest)))
        best, least = None, np.inf
        length = self._fit(bucket(longest))
        while True:
            plan = plan_rows(leaves, length)
            rows = len(plan.rows)
            cost = _round_up(rows, self.rows_of(plan)) * self._row_cost(length)
            cost *= 1 if length in self.used else NEW_SHAPE_COST
            if cost < least:
                best, least = plan, cost
            if rows == 1 or 2 * length > LONGEST_ROW:
                break
            length *= 2
        assert best is not None
        self.used.add(best.length)
        return best

    def rows_of(self, plan: Plan) -> int:
        """Rows of a batch."""
        if self.rows is not None:
            return _round_up(self.rows, self.batch_parts)
        most = max(TOKENS_AT_ONCE // plan.length, 1)
        needed = -(-len(plan.rows) // self.batch_parts)
        return self.batch_parts * min(most, 1 << (needed - 1).bit_length())

    def places_of(self, needed: int) -> int:
        """Places of a row, for so many that are scored."""
        return _round_up(max(FEWEST_PLACES, 1 << (needed - 1).bit_length()), self.sequence_parts)

    def _fit(self, length: int) -> int:
        return _round_up(length, self.sequence_parts)

    def _row_cost(self, length: int) -> float:
        """Time of a row, in that of a token without attention: a layer multiplies 4 D^2 + 3 D F and D T / 2 * 2."""
        weights = 4 * self.config.hidden_size + 3 * self.config.intermediate_size
        return length * (1 + ATTENTION_COST * length / weights)


def make_batches(plan: Plan, items: Sequence[Item], shapes: Shapes) -> Iterator[Batch]:
    """The rows of `plan`, those with most places first; rows of padding fill the last batch."""
    items_of: list[list[int]] = [[] for _ in plan.rows]
    for number, place in enumerate(plan.places):
        items_of[place.row].append(number)
    needed = [sum(len(items[number].labels) for number in numbers) for numbers in items_of]
    order = sorted(range(len(plan.rows)), key=lambda row: -needed[row])
    count, places = shapes.rows_of(plan), 0
    for first in range(0, len(order), count):
        chosen = order[first : first + count]
        most = needed[chosen[0]]
        # A fresh shape must be worth its compilation.
        if not places or most <= places // 4:
            places = shapes.places_of(most)
        batch = Batch(empty_rows(count, plan.length, places), [])
        for row, number in enumerate(chosen):
            _fill(batch, row, plan, number, items, items_of[number])
        yield batch


def _fill(batch: Batch, row: int, plan: Plan, number: int, items: Sequence[Item], in_row: Sequence[int]) -> None:
    """Row `number` of the plan as row `row` of the batch."""
    rows, column, place = batch.rows, 0, 0
    for segment, document in enumerate(plan.rows[number], 1):
        for branch, ids in enumerate([document.trunk, *document.branches]):
            here = slice(column, column + len(ids))
            rows.ids_BT[row, here] = ids
            rows.segments_BT[row, here] = segment + (branch << TRUNK_BITS)
            column += len(ids)
    for item in in_row:
        fed, labels, _ = items[item]
        here = slice(place, place + len(labels))
        rows.places_BS[row, here] = plan.places[item].columns(len(fed) - len(labels), len(fed))
        rows.labels_BS[row, here] = labels
        batch.slots.append(Slot(item, row, place))
        place += len(labels)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
