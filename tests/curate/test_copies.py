"""Groups and components against plain Python and scipy."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from bc2_jax.curate import copies
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.minhash import VALUES

ENGINE = Engine("native")


def frame(**columns):
    import daft

    return daft.from_pydict({name: np.asarray(column, np.int64) for name, column in columns.items()})


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20), st.integers(2, 4), st.integers(0, 99))
def test_later_copies(keys, least, seed):
    rng = np.random.default_rng(seed)
    key = np.array(keys)[rng.integers(0, len(keys), 60)]
    second, place = rng.integers(0, 2, 60), rng.permutation(60)
    expected = set()
    for group in set(zip(key.tolist(), second.tolist(), strict=True)):
        places = sorted(place[(key == group[0]) & (second == group[1])].tolist())
        if len(places) >= least:
            expected |= {(*group, p, places[0]) for p in places[1:]}
    found = copies.later_copies(frame(key=key, second=second, place=place), ["key", "second"], "place", ENGINE, least)
    rows = found.to_pydict()
    assert set(zip(rows["key"], rows["second"], rows["place"], rows["first"], strict=True)) == expected
    assert len(rows["key"]) == len(expected)


def test_ranges_of_keys_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**63), 2**63, 300)[rng.integers(0, 300, 2000)]
    rows = frame(key=keys, place=rng.permutation(2000))
    whole = copies.later_copies(rows, ["key"], "place", ENGINE).sort("place").to_pydict()
    monkeypatch.setattr(copies, "_GROUPED_ROWS", 150)
    assert copies.later_copies(rows, ["key"], "place", ENGINE).sort("place").to_pydict() == whole
    assert len(whole["place"]) > 1500


def test_ranges_cover_all_keys_once():
    keys = [-(2**63), -1, 0, 1, 2**63 - 1, 2**62]
    for ranges in (1, 2, 3, 7):
        for key in keys:
            assert sum(bool(copies.in_range(key, i, ranges)) for i in range(ranges)) == 1


@pytest.mark.parametrize("nodes, count", [(40, 25), (400, 300), (60, 200), (5, 0)])
def test_components(nodes, count):
    rng = np.random.default_rng(nodes)
    a, b = rng.integers(0, nodes, (2, count))
    found = copies.components(frame(a=a, b=b), ENGINE).to_pydict()
    _, labels = connected_components(scipy.sparse.coo_matrix((np.ones(count), (a, b)), (nodes, nodes)))
    expected = {}
    for label in range(labels.max() + 1):
        first, *others = np.flatnonzero(labels == label).tolist()
        expected |= dict.fromkeys(others, first)
    assert dict(zip(found["node"], found["first"], strict=True)) == expected


def test_components_of_a_long_chain():
    found = copies.components(frame(a=np.arange(500), b=np.arange(1, 501)), ENGINE).to_pydict()
    assert sorted(found["node"]) == list(range(1, 501)) and set(found["first"]) == {0}


def signature(values):
    import daft

    rows = np.asarray(values, np.uint32)
    return daft.from_pydict({"doc": np.arange(len(rows)), "signature": [row.tobytes() for row in rows]})


def test_what_goes_is_similar_to_what_stays():
    """0-1-2 is a chain: 1 is like 0, 2 is like 1, but 2 is not like 0; and 3 is like 2."""
    rows = np.tile(np.arange(VALUES), (5, 1))
    rows[1, :40] += 1000
    rows[2, :80] += 1000
    rows[3, :80] += 1000
    rows[3, 100:] += 2000
    rows[4] += 5000
    edges = frame(a=[1, 2, 3, 4], b=[0, 1, 2, 3])
    found = copies.resolve(edges, signature(rows), 0.6, ENGINE).to_pydict()
    # 1 goes for 0. 2 is joined to 0 through 1 alone, so it stays, and 3 goes for it. 4 is like none.
    assert dict(zip(found["doc"], found["first"], strict=True)) == {1: 0, 3: 2}
    assert dict(zip(found["doc"], found["similarity"], strict=True)) == pytest.approx({1: 88 / 128, 3: 100 / 128})


def test_no_edges():
    rows = copies.resolve(frame(a=[], b=[]), signature(np.zeros((1, VALUES))), 0.5, ENGINE).to_pydict()
    assert rows == {"doc": [], "first": [], "similarity": []}
