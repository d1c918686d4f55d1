"""Packs token sequences into rows that hold common prefixes once.

A row holds documents of `kernels.segments`: a trunk (common prefix) and branches that continue it. Prefixes are found
by comparing ids: the shots of a subject, or a question with several continuations, become trunks.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.kernels.segments import TRUNK_BITS

MOST_BRANCHES = 2 ** (31 - TRUNK_BITS) - 1
"""Branches per trunk in a row, limited by int32 segments; further branches repeat the trunk."""


class Document(NamedTuple):
    """A trunk and its branches, part of a row."""

    trunk: np.ndarray
    branches: list[np.ndarray]

    @property
    def length(self) -> int:
        return len(self.trunk) + sum(map(len, self.branches))


class Place(NamedTuple):
    """Location of a sequence: its first tokens are in a trunk, the others in a branch."""

    row: int
    trunk_start: int  # column of the first token
    trunk_length: int
    branch_start: int  # column of token number `trunk_length`

    def columns(self, first: int, end: int) -> np.ndarray:
        """Columns of tokens first..end - 1."""
        tokens = np.arange(first, end)
        in_trunk = tokens < self.trunk_length
        return tokens + np.where(in_trunk, self.trunk_start, self.branch_start - self.trunk_length)


class Leaves(NamedTuple):
    """Distinct sequences that are not a prefix of another, sorted, and the common prefixes of neighbours."""

    ids: list[np.ndarray]
    leaf_of: list[int]  # for each sequence a leaf that begins with it
    common: list[int]  # length of the common prefix of each leaf and the next


class Plan(NamedTuple):
    """Rows of at most `length` tokens, and the location of each sequence."""

    length: int
    rows: list[list[Document]]
    places: list[Place]

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(document.length for row in self.rows for document in row)


def plan_rows(leaves: Leaves, length: int) -> Plan:
    """Packs the sequences of `leaves` into rows of at most `length` tokens, independent of their order.

    A prefix of another sequence takes no room.
    """
    lengths = [len(ids) for ids in leaves.ids]
    chunks = []  # (tokens of the trunk, leaves) of each document
    for first, end, trunk in _choose_trunks(lengths, leaves.common, length):
        if end - first == 1:
            chunks.append((trunk, [first]))
            continue
        packed = pack_bins([lengths[i] - trunk for i in range(first, end)], length - trunk, MOST_BRANCHES)
        chunks += [(trunk, [first + i for i in numbers]) for numbers in packed]
    sizes = [trunk + sum(lengths[i] - trunk for i in numbers) for trunk, numbers in chunks]
    rows: list[list[Document]] = []
    places: dict[int, Place] = {}
    for row, in_row in enumerate(pack_bins(sizes, length)):
        start, documents = 0, []
        for trunk, numbers in (chunks[chunk] for chunk in in_row):
            column = start + trunk
            for i in numbers:
                places[i] = Place(row, start, trunk, column)
                column += lengths[i] - trunk
            branches = [leaves.ids[i][trunk:] for i in numbers if lengths[i] > trunk]
            documents.append(Document(leaves.ids[numbers[0]][:trunk], branches))
            start = column
        rows.append(documents)
    return Plan(length, rows, [places[leaf] for leaf in leaves.leaf_of])


def pack_bins(sizes: Sequence[int], capacity: int, most: int | None = None) -> list[list[int]]:
    """Item indices of each bin, by best fit decreasing; at most `most` items in a bin."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        at = bisect.bisect_left(free, (sizes[item], -1))
        if at == len(free):
            bins.append([])
            room, chosen = capacity, len(bins) - 1
        else:
            room, chosen = free.pop(at)
        bins[chosen].append(item)
        if room > sizes[item] and (most is None or len(bins[chosen]) < most):
            bisect.insort(free, (room - sizes[item], chosen))
    return bins


def find_leaves(sequences: Sequence[np.ndarray]) -> Leaves:
    """The leaves of sequences of int32 ids, at least one token each."""
    keys = [np.asarray(ids, ">i4").tobytes() for ids in sequences]  # ids are not negative, so bytes sort as they do
    found: list[int] = []
    leaf_of = [0] * len(keys)
    for number in sorted(range(len(keys)), key=lambda number: keys[number], reverse=True):
        # In sorted order, everything between a prefix and a sequence that has it, has it too.
        if not found or not keys[found[-1]].startswith(keys[number]):
            found.append(number)
        leaf_of[number] = len(found) - 1
    ids = [np.asarray(sequences[leaf]) for leaf in reversed(found)]
    common = [_common_length(a, b) for a, b in zip(ids, ids[1:], strict=False)]
    return Leaves(ids, [len(found) - 1 - leaf for leaf in leaf_of], common)


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two sequences of which neither is a prefix of the other."""
    shorter = min(len(a), len(b))
    return int((a[:shorter] != b[:shorter]).argmax())


class _Node:
    """Neighbouring leaves with a common prefix of `depth` tokens, and their cheapest grouping so far."""

    def __init__(self, depth: int):
        self.depth, self.tokens, self.count = depth, 0, 0
        self.cost = 0
        self.groups: list[tuple[int, int, int]] = []
        """(first leaf, end, trunk)."""

    @classmethod
    def leaf(cls, number: int, length: int) -> _Node:
        node = cls(length)
        node.tokens, node.count, node.cost, node.groups = length, 1, length, [(number, number + 1, length)]
        return node

    def add(self, child: _Node) -> None:
        self.tokens += child.tokens
        self.count += child.count
        self.cost += child.cost
        self.groups += child.groups

    def close(self, row: int) -> _Node:
        """Groups all leaves under one trunk if that takes fewer tokens; every row repeats the trunk."""
        branches = self.tokens - self.count * self.depth
        rows = max(math.ceil(branches / (row - self.depth)), math.ceil(self.count / MOST_BRANCHES))
        cost = branches + rows * self.depth
        if cost < self.cost:
            self.cost, self.groups = cost, [(self.groups[0][0], self.groups[-1][1], self.depth)]
        return self


def _choose_trunks(lengths: list[int], common: list[int], row: int) -> Iterator[tuple[int, int, int]]:
    """(first leaf, end, trunk length) of each group of neighbouring leaves; a single leaf is all trunk.

    One pass over the prefix tree; `open_` is the path of inner nodes to the newest leaf.
    """
    root = _Node(0)
    open_ = [root]
    for number, (length, depth) in enumerate(zip(lengths, [*common, 0], strict=True)):
        node = _Node.leaf(number, length)
        while open_[-1].depth > depth:
            open_[-1].add(node)
            node = open_.pop().close(row)
        if open_[-1].depth < depth:
            open_.append(_Node(depth))
        open_[-1].add(node)
    yield from root.groups
