"""Mixing sources by exact shares, with random access: which row of which source row n of a run is.

(source, row) is computed from n alone: each stage repeats a fixed pattern, and continues each source where the previous
stage left it. So a run may start at any step, on any number of processes, and a change of the mixture neither repeats
nor skips a row.
"""

from __future__ import annotations

import bisect
import dataclasses
import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np

PERIOD = 1 << 20
"""Rows after which the order of sources repeats."""


class Interleave:
    """An endless sequence of sources, as even as possible.

    `shares` are positive or zero, with any sum. In each PERIOD rows a source with a share has at least one row, and its
    number differs from the exact one by less than 1 (or than the number of sources, if some would have had none). After
    any number of rows a source is at most (sources + 1) / 2 rows off.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.counts = _apportion(np.asarray(shares, np.float64), PERIOD)
        """Rows of each source in a period, int64."""
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        ranks = np.arange(PERIOD) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        # Each source's rows in the middle of equal stretches, merged. In integers: ties must not depend on rounding.
        order = np.argsort((2 * ranks + 1) * PERIOD // self.counts[sources], kind="stable")
        self._sources, self._ranks = sources[order].astype(np.int32), ranks[order].astype(np.int32)

    def locate(self, row: int) -> tuple[int, int]:
        """The source of `row`, and its number of earlier rows."""
        period, place = divmod(row, PERIOD)
        source = int(self._sources[place])
        return source, period * int(self.counts[source]) + int(self._ranks[place])

    def rows_read(self, rows: int) -> np.ndarray:
        """Rows of each source among the first `rows`, int64 [sources]."""
        period, place = divmod(rows, PERIOD)
        return period * self.counts + np.bincount(self._sources[:place], minlength=len(self.counts))


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """`total` split into integers by largest remainders; a positive share has at least 1."""
    if shares.ndim != 1 or not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError(f"shares = {shares.tolist()} are not valid: they must be at least 0, one of them positive.")
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - counts.sum()]] += 1
    for index in np.flatnonzero((counts == 0) & (shares > 0)):
        counts[np.argmax(counts)] -= 1
        counts[index] = 1
    return counts


@dataclasses.dataclass(frozen=True)
class Stage:
    """Shares from a row of the run on."""

    start: int
    shares: tuple[float, ...]


class Rows(Protocol):
    """Endless rows of one source, epoch after epoch."""

    def __getitem__(self, index: int) -> bytes: ...


class Mixture:
    """The rows of a run as a random-access data source for Grain. The first of `stages` starts at row 0."""

    def __init__(self, sources: Sequence[Rows], stages: Sequence[Stage]) -> None:
        self._sources = sources
        self._starts = [stage.start for stage in stages]
        self._stages = [Interleave(stage.shares) for stage in stages]
        self._before = [np.zeros(len(stages[0].shares), np.int64)]
        """Rows of each source read before each stage."""
        for index in range(1, len(stages)):
            length = self._starts[index] - self._starts[index - 1]
            self._before.append(self._before[-1] + self._stages[index - 1].rows_read(length))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> bytes:
        source, index = self.locate(row)
        return self._sources[source][index]

    def __repr__(self) -> str:
        return f"Mixture of {len(self._sources)}"

    def locate(self, row: int) -> tuple[int, int]:
        """The source of a row of the run, and its number of earlier rows."""
        stage = bisect.bisect_right(self._starts, row) - 1
        source, index = self._stages[stage].locate(row - self._starts[stage])
        return source, int(self._before[stage][source]) + index

    def rows_read(self, rows: int) -> np.ndarray:
        """Rows of each source among the first `rows` of the run, int64 [sources]."""
        stage = max(bisect.bisect_left(self._starts, rows) - 1, 0)
        return self._before[stage] + self._stages[stage].rows_read(rows - self._starts[stage])
