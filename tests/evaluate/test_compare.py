"""Paired comparison, against resampling lists of items."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.evaluate.compare import bootstrap, compare, compare_scores, print_differences
from bc2_jax.evaluate.records import RecordFile, write_json
from bc2_jax.terminal import make_console


def test_the_distribution_is_that_of_resampled_items():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, 300), rng.random(300)
    ours = bootstrap(a, b, resamples=4000)
    drawn = np.array([(b - a)[rng.integers(0, 300, 300)].mean() for _ in range(4000)])
    assert ours.mean() == pytest.approx(drawn.mean(), abs=5 * drawn.std() / 4000**0.5)
    assert ours.std() == pytest.approx(drawn.std(), rel=0.05)
    np.testing.assert_allclose(np.quantile(ours, (0.025, 0.975)), np.quantile(drawn, (0.025, 0.975)), atol=0.006)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_what_holds_of_every_comparison(pairs):
    a, b = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    found, other = compare_scores("t", "acc", a, b), compare_scores("t", "acc", b, a)
    assert found.difference == pytest.approx(found.b - found.a) == pytest.approx(-other.difference)
    assert found.low - 1e-9 <= found.difference <= found.high + 1e-9
    assert (found.better, found.worse, found.p) == (other.worse, other.better, other.p)
    same = compare_scores("t", "acc", a, a)
    assert (same.low, same.high, same.share, same.p) == (0, 0, 0.5, 1)


def test_a_difference_that_is_there_is_seen():
    a = [1.0] * 50 + [0.0] * 50
    found = compare_scores("t", "acc", a, [1.0] * 70 + [0.0] * 30)
    assert (found.difference, found.better, found.worse) == (pytest.approx(20), 20, 0)
    assert found.low > 10 and found.share > 0.999 and found.p == pytest.approx(2 / 2**20)


def write(folder, name="quiz", count=12, unit="percent", **changes):
    records = []
    for n in range(count):
        right = {"as_shown": n % 2 == 0, "bare": n % 3 == 0}
        records.append({"id": str(n), "prompt": f"{n}?", "choices": ["A", "B"], "gold": [0], "right": right} | changes)
    RecordFile(folder / name / "records.jsonl").add(records)
    write_json(folder / name / "results.json", {"task": name, "unit": unit, "headline": "as_shown"})


def test_folders_are_compared_on_the_items_that_both_have(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    write(a)
    write(a, "alone")
    write(b, count=9, right={"as_shown": True, "bare": False})
    for folder in (a, b):
        write(folder, "bleu", unit="points")
        write(folder, "unknown", right={})
    (found,), left_out = compare(a, b)
    assert set(left_out) == {"bleu", "unknown"} and "not a mean over items" in left_out["bleu"]
    assert (found.task, found.way, found.items, found.b) == ("quiz", "as_shown", 9, 100)
    assert compare(a, b, "bare")[0][0].b == 0
    print_differences(make_console(), [found], left_out, str(a), str(b))
    out = capsys.readouterr().out
    assert "quiz" in out and "unknown is left out: no item that both have is judged" in out


@pytest.mark.parametrize("field, value", [("prompt", "x"), ("choices", ["A"]), ("gold", [1])])
def test_answers_to_other_prompts_are_not_compared(field, value, tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", **{field: value})
    with pytest.raises(ValueError, match=f"quiz cannot be compared: '0' has another {field}"):
        compare(tmp_path / "a", tmp_path / "b")


def test_nothing_to_compare_is_told(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", "other")
    with pytest.raises(ValueError, match="no benchmark in common .quiz; other."):
        compare(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "c", right={})
    with pytest.raises(ValueError, match="no item that both have is judged"):
        compare(tmp_path / "a", tmp_path / "c")
    (tmp_path / "a" / "quiz" / "results.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="results.json is damaged"):
        compare(tmp_path / "a", tmp_path / "b")
