"""Packs requests into batches of rows with few shapes, and locates each request's scores."""

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

LONGEST_ROW = 8192  # tokens of a row, unless a request is longer
TOKENS_AT_ONCE = 8192  # tokens of a batch per batch shard
FEWEST_PLACES = 64  # minimum of scored places per row, so that few programs are compiled
ATTENTION_COST = 1.0
"""Time of attention over all earlier tokens of a row, relative to a layer's matmuls of the same FLOPs: softmax costs
more, but blocks of other branches are skipped."""
NEW_SHAPE_COST = 1.25  # penalty on the estimated time of a new row length, which must be compiled


class Item(NamedTuple):
    """A request as model input: int32 arrays."""

    fed: np.ndarray
    labels: np.ndarray  # the next tokens after the last len(labels) of `fed`
    cut: int  # context tokens dropped before `fed`


class Slot(NamedTuple):
    """An item's scores: places first..first + len(labels) - 1 of a row."""

    item: int
    row: int
    first: int


class Batch(NamedTuple):
    rows: Rows
    slots: list[Slot]


@dataclasses.dataclass
class Shapes:
    """Chooses batch shapes with little padding and few compilations."""

    config: ModelConfig
    rows: int | None  # per batch; None to choose
    row_length: int | None  # none to choose
    batch_parts: int  # rows per batch are a multiple of it, columns and places of `sequence_parts`
    sequence_parts: int
    used: set[int] = dataclasses.field(default_factory=set)  # row lengths chosen before

    def plan(self, items: Sequence[Item]) -> Plan:
        """The rows with the least estimated time: long rows share trunks among more requests, short ones have cheaper
        attention."""
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
        """Rows per batch."""
        if self.rows is not None:
            return _round_up(self.rows, self.batch_parts)
        most = max(TOKENS_AT_ONCE // plan.length, 1)
        needed = -(-len(plan.rows) // self.batch_parts)
        return self.batch_parts * min(most, 1 << (needed - 1).bit_length())

    def places_of(self, needed: int) -> int:
        """Places per row for `needed` scored tokens."""
        return _round_up(max(FEWEST_PLACES, 1 << (needed - 1).bit_length()), self.sequence_parts)

    def _fit(self, length: int) -> int:
        return _round_up(length, self.sequence_parts)

    def _row_cost(self, length: int) -> float:
        """Time of a row in units of a token without attention; FLOPs a token: 4 D^2 + 3 D F, attention D T / 2 * 2."""
        weights = 4 * self.config.hidden_size + 3 * self.config.intermediate_size
        return length * (1 + ATTENTION_COST * length / weights)


def make_batches(plan: Plan, items: Sequence[Item], shapes: Shapes) -> Iterator[Batch]:
    """The rows of `plan`, those with most scored tokens first; padding rows fill the last batch."""
    items_of: list[list[int]] = [[] for _ in plan.rows]
    for number, place in enumerate(plan.places):
        items_of[place.row].append(number)
    needed = [sum(len(items[number].labels) for number in numbers) for numbers in items_of]
    order = sorted(range(len(plan.rows)), key=lambda row: -needed[row])
    count, places = shapes.rows_of(plan), 0
    for first in range(0, len(order), count):
        chosen = order[first : first + count]
        most = needed[chosen[0]]
        # Only a much smaller shape is worth a compilation.
        if not places or most <= places // 4:
            places = shapes.places_of(most)
        batch = Batch(empty_rows(count, plan.length, places), [])
        for row, number in enumerate(chosen):
            _fill(batch, row, plan, number, items, items_of[number])
        yield batch


def _fill(batch: Batch, row: int, plan: Plan, number: int, items: Sequence[Item], in_row: Sequence[int]) -> None:
    """Writes row `number` of the plan into row `row` of the batch."""
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
