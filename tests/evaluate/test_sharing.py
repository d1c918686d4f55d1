"""Rows hold every sequence whole, in its trunk and its branch, with less of what is said twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.evaluate.sharing import MOST_BRANCHES, Plan, find_leaves, pack_bins, plan_rows

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)


def arrays(sequences) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in sequences]


def check(plan: Plan, sequences) -> None:
    """Each sequence is found at its place, its branch right where a document has one."""
    columns, starts = [], []
    for row in plan.rows:
        parts = [part for document in row for part in (document.trunk, *document.branches)]
        columns.append(np.concatenate(parts))
        starts.append(dict(zip(np.cumsum([0, *map(len, parts)]).tolist(), parts, strict=False)))
        assert len(columns[-1]) <= plan.length
        assert all(len(document.branches) <= MOST_BRANCHES and len(document.trunk) for document in row)
    for ids, place in zip(sequences, plan.places, strict=True):
        assert columns[place.row][place.columns(0, len(ids))].tolist() == list(ids)
        trunk = starts[place.row][place.trunk_start]
        assert len(trunk) == place.trunk_length
        if len(ids) > len(trunk):
            assert len(starts[place.row][place.branch_start]) >= len(ids) - len(trunk)


@settings(max_examples=60)
@given(SEQUENCES, st.integers(12, 40), st.randoms())
def test_rows_hold_every_sequence(sequences, length, random):
    plan = plan_rows(find_leaves(arrays(sequences)), length)
    check(plan, sequences)
    assert plan.tokens <= sum(map(len, {tuple(ids) for ids in sequences}))
    other = random.sample(sequences, len(sequences))
    again = plan_rows(find_leaves(arrays(other)), length)
    assert [[d.length for d in row] for row in again.rows] == [[d.length for d in row] for row in plan.rows]


def test_what_is_shared_stands_once_a_row():
    """Two subjects of 20 questions of 10 tokens behind shots of 50: 500 tokens instead of 2,400."""
    shots = [np.full(50, subject) for subject in (1, 2)]
    questions = [np.concatenate([shots[n % 2], [n + 10], np.full(9, 3)]) for n in range(40)]
    letters = [np.concatenate([question, [letter]]) for question in questions for letter in (5, 6)]
    plan = plan_rows(find_leaves([*questions, *letters, *questions[:3]]), 256)
    check(plan, [*questions, *letters, *questions[:3]])
    # With two tokens behind each question, a branch is a question and its letter; three rows have each trunk.
    assert plan.tokens == 80 * 11 + 6 * 50
    whole = plan_rows(find_leaves(questions), 256)
    assert (len(whole.rows), whole.tokens) == (2, 2 * 50 + 40 * 10)


def test_options_of_long_questions_share_the_question():
    """The trunk is what saves most: here the question, not the few words that all questions begin with."""
    questions = [np.concatenate([[1, 2], np.full(60, 10 + n)]) for n in range(5)]
    options = [np.concatenate([question, np.full(4, letter)]) for question in questions for letter in range(90, 94)]
    plan = plan_rows(find_leaves(options), 512)
    assert plan.tokens == 5 * (62 + 4 * 4)
    assert sorted(len(document.branches) for row in plan.rows for document in row) == [4] * 5


def test_more_branches_than_segments_count():
    sequences = [np.array([7, 8, 9, n]) for n in range(300)]
    plan = plan_rows(find_leaves(sequences), 4096)
    check(plan, sequences)
    assert (len(plan.rows), plan.tokens) == (1, 300 + 3 * 3)


@given(st.lists(st.integers(1, 10), max_size=30), st.integers(10, 20), st.sampled_from([None, 1, 3]))
def test_bins_hold_what_fits(sizes, capacity, most):
    bins = pack_bins(sizes, capacity, most)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in items) <= capacity and len(items) <= (most or 99) for items in bins)
    if most is None:
        assert sum(2 * sum(sizes[item] for item in items) <= capacity for items in bins) <= 1  # no two half empty
