"""Shots go as a whole; figures and their standard errors against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.evaluate.task import Example, Fitted, Judged, Metric, fit_shots, groups_first, mean_of_groups, summarize


def example(shots: list[str], drop: str = "last", header: str = "h" * 5, question: str = "q" * 7, **more) -> Example:
    return Example("1", "g", question, header, tuple(shots), drop=drop, **more)


@pytest.mark.parametrize(
    ("drop", "kept"), [("first", ["bb", "ccc", "d"]), ("last", ["aaa", "bb"]), ("longest", ["bb", "d"])]
)
def test_which_shots_go(drop: str, kept: list[str]):
    """CMMLU's rule takes all shots of the longest length at once, though one of them would do here."""
    fitted = fit_shots(example(["aaa", "bb", "ccc", "d"], drop), 5 + 7 + 7, len)
    assert fitted == Fitted("hhhhh" + "".join(kept) + "qqqqqqq", 4 - len(kept), False, True)


@given(
    st.lists(st.integers(0, 9).map(lambda n: "s" * n), max_size=6),
    st.sampled_from(["first", "last", "longest"]),
    st.integers(0, 9),
    st.integers(1, 30),
    st.integers(1, 60),
    st.none() | st.integers(1, 60),
)
def test_what_is_left_fits_and_is_the_most_that_fits(shots, drop, header, question, room, limit):
    asked = example(shots, drop, "h" * header, "q" * question, prompt_limit=limit)
    text, dropped, header_dropped, fits = fit_shots(asked, room, len)
    least = min(room, limit or room)
    assert text.endswith("q" * question)
    assert fits == (len(text) <= room)
    assert header_dropped == bool(header and header + question > least)
    if dropped < len(shots):
        assert len(text) <= least
    kept = len(shots) - dropped
    if drop == "longest":
        sizes = sorted(map(len, shots))
        left = [shot for shot in shots if len(shot) <= sizes[kept - 1]] if kept else []
        assert len(left) == kept  # all shots of a length, or none
        last = sizes[kept] if dropped else 0
    else:
        left = shots[dropped:] if drop == "first" else shots[:kept]
        last = len(shots[dropped - 1] if drop == "first" else shots[kept]) if dropped else 0
    assert text == "h" * header * (not header_dropped) + "".join(left) + "q" * question
    if dropped:  # with the shot that went last, it would not fit
        again = last * (sizes.count(last) if drop == "longest" else 1)
        assert header + len("".join(left)) + again + question > least


def test_an_official_limit_does_not_make_a_question_too_long_for_the_model():
    asked = example(["s" * 9], question="q" * 40, prompt_limit=30)
    assert fit_shots(asked, 50, len) == Fitted("q" * 40, 1, True, True)
    assert fit_shots(asked, 39, len) == Fitted("q" * 40, 1, True, False)


def judge(rows: dict[str, list[bool]], way: str = "as_shown", **more: bool) -> list[Judged]:
    return [
        Judged(Example(f"{group}/{n}", group, "?"), {way: right, **more}, "A")
        for group, items in rows.items()
        for n, right in enumerate(items)
    ]


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.booleans(), min_size=2, max_size=9), min_size=2))
def test_means_and_standard_errors(rows):
    metrics = summarize(judge(rows))
    items = 100.0 * np.array([one for group in rows.values() for one in group])
    value, stderr, count = metrics["as_shown"]
    assert count == len(items)
    assert value == pytest.approx(items.mean())
    assert stderr == pytest.approx(items.std(ddof=1) / math.sqrt(len(items)))
    value, stderr, count = metrics["as_shown, mean of groups"]
    groups = [100.0 * np.array(group) for group in rows.values()]
    assert value == pytest.approx(np.mean([group.mean() for group in groups]))
    variance = sum(group.var(ddof=1) / len(group) for group in groups) / len(groups) ** 2
    assert stderr == pytest.approx(math.sqrt(variance))
    assert count == len(items)


def test_a_group_of_one_item_has_the_spread_of_all():
    right = {"a": [True], "b": [True, False, False]}
    spread = 100 * np.std([1, 1, 0, 0], ddof=1)
    other = 100 * np.std([1, 0, 0], ddof=1) / math.sqrt(3)
    assert mean_of_groups(right).stderr == pytest.approx(math.hypot(spread, other) / 2)
    assert math.isnan(mean_of_groups({"a": [True]}).stderr)


def test_no_figure_without_published_answers():
    hidden = [one._replace(right={}) for one in judge({"a": [True, False]})]
    assert summarize(hidden) == {}
    assert summarize([*hidden, *judge({"a": [True]})])["as_shown"] == Metric(
        100.0, pytest.approx(math.nan, nan_ok=True), 1
    )


def test_the_order_of_figures_is_theirs():
    judged = judge({"a": [True, False], "b": [True]}, bare=False)
    first = ["as_shown", "as_shown, mean of groups", "bare", "bare, mean of groups"]
    assert list(summarize(judged)) == first
    assert list(groups_first(judged)) == [first[1], first[0], first[3], first[2]]
    assert list(groups_first(judge({"a": [True]}))) == ["as_shown"]
