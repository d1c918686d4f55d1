"""The estimate of pass@k, against counting."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.evaluate.pass_at_k import pass_at_k, summarize
from bc2_jax.evaluate.task import Example, Judged


@given(st.data())
def test_it_is_the_share_of_all_choices_of_k(data):
    n = data.draw(st.integers(1, 7))
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    chosen = list(itertools.combinations([place < right for place in range(n)], k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize(("n", "right", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_impossible_counts_are_refused(n, right, k):
    with pytest.raises(ValueError, match="must be in"):
        pass_at_k(n, right, k)


def judged(name: str, *passed: bool | None) -> list[Judged]:
    example = Example(id=name, group="", header="", shots=(), question="")
    return [Judged(example, {} if one is None else {"passed": one}, "") for one in passed]


def test_one_answer_to_each_task():
    found = summarize([one for n, passed in enumerate([True, False, False, True]) for one in judged(str(n), passed)])
    assert list(found) == ["pass@1"]
    assert found["pass@1"].value == 50 and found["pass@1"].items == 4
    assert found["pass@1"].stderr == pytest.approx(100 * math.sqrt(0.25 / 3))  # sd of 0, 0, 1, 1, over 4


def test_ten_answers_to_each_task():
    found = summarize(judged("a", *[True] * 5, *[False] * 5) + judged("b", *[False] * 10))
    assert found["pass@1"].value == pytest.approx(25)
    assert found["pass@10"].value == pytest.approx(50)
    assert "pass@100" not in found


def test_what_was_not_run_has_no_figure():
    assert summarize(judged("a", None)) == {}
    assert summarize([]) == {}
