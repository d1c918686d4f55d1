"""How many rows a benchmark takes, from assumed numbers of tokens."""

from __future__ import annotations

import pytest

from bc2_jax.aot.scoring import DEFAULT_BENCHMARKS, Benchmark


def test_rows_hold_the_shots_once_each():
    """Two subjects of 50 questions of 10: 500 tokens fill 5 rows of 120 with shots of 20 in each."""
    benchmark = Benchmark("b", items=100, subjects=2, shot_tokens=20, question_tokens=10)
    assert benchmark.rows(120) == 10
    assert benchmark.rows(1200) == pytest.approx((100 * 10 + 2 * 20) / 1200)  # both subjects in one row
    assert all(benchmark.rows(4096) < benchmark.rows(1024) for benchmark in DEFAULT_BENCHMARKS)


def test_benchmarks_are_read_as_they_are_written():
    for benchmark in DEFAULT_BENCHMARKS:
        assert Benchmark.parse(str(benchmark)) == benchmark


@pytest.mark.parametrize("text", ["a", "a:1:2:3", "a:1:2:3:x", "a:1:2:3:-4", "a:0:2:3:4", "a:1:2:3:4:5"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"benchmark|a\.items"):
        Benchmark.parse(text)


def test_a_question_must_fit_its_row():
    with pytest.raises(ValueError, match="b: shots of 20 tokens and a question of 10 do not fit a row of 25"):
        Benchmark("b", 1, 1, 20, 10).rows(25)
