"""Shares as written, and no row lost or repeated at a change of the mixture."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.data.mixture import PERIOD, Interleave, Mixture, Stage

SHARES = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=7).filter(any)


@given(SHARES, st.integers(0, 3 * PERIOD))
def test_counts_are_the_shares(shares: list[float], rows: int) -> None:
    order = Interleave(shares)
    exact = np.array(shares) / sum(shares) * PERIOD
    assert order.counts.sum() == PERIOD and (np.abs(order.counts - exact) < 1).all()
    assert ((order.counts > 0) == (np.array(shares) > 0)).all()
    read = order.rows_read(rows)
    assert read.sum() == rows
    assert (np.abs(read - rows * order.counts / PERIOD) <= (len(shares) + 1) / 2).all()


@given(SHARES, st.integers(0, 2 * PERIOD))
def test_a_row_is_found_by_arithmetic(shares: list[float], start: int) -> None:
    order = Interleave(shares)
    before = order.rows_read(start)
    for row in range(start, start + 40):
        source, index = order.locate(row)
        assert index == before[source]
        before[source] += 1
    assert (before == order.rows_read(start + 40)).all()


def test_simple_weights_are_exact() -> None:
    order = Interleave([3, 1])
    assert [order.locate(row)[0] for row in range(8)] in ([0, 1, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0])
    assert order.rows_read(4_000_000).tolist() == [3_000_000, 1_000_000]


def test_a_tiny_share_is_read_all_the_same() -> None:
    order = Interleave([1.0, 1e-12, 0.0])
    assert order.counts.tolist() == [PERIOD - 1, 1, 0]


@given(st.data())
def test_each_source_goes_on_where_the_stage_before_left_it(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    shares = st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.5]), min_size=size, max_size=size).filter(any)
    lengths = data.draw(st.lists(st.integers(1, 60), max_size=4))
    starts = [0, *np.cumsum(lengths).tolist()]
    stages = [Stage(start, tuple(data.draw(shares))) for start in starts]
    mixture = Mixture([range(10**6)] * size, stages)  # type: ignore[list-item]
    seen: collections.Counter[int] = collections.Counter()
    total = starts[-1] + 50
    for row in range(total):
        assert mixture.rows_read(row).tolist() == [seen[source] for source in range(size)]
        source, index = mixture.locate(row)
        assert stages[sum(start <= row for start in starts) - 1].shares[source] > 0
        assert index == seen[source] == mixture[row]
        seen[source] += 1
    for stage, end in zip(stages, [*starts[1:], total], strict=True):
        read = mixture.rows_read(end) - mixture.rows_read(stage.start)
        share = np.array(stage.shares) / sum(stage.shares)
        assert (np.abs(read - (end - stage.start) * share) <= (size + 1) / 2 + 1e-3).all()


@pytest.mark.parametrize("shares", [(), (0.0,), (-1.0, 2.0), (float("nan"),)])
def test_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares = .* are not valid"):
        Interleave(shares)
