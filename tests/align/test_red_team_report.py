"""Counts of a red team: groups, changes prompt by prompt, files."""

from __future__ import annotations

import json

import pytest

from bc2_jax.align import red_team_report as report
from bc2_jax.align.intervals import sign_test, wilson
from bc2_jax.align.red_team import AttackAnswer, Result
from bc2_jax.align.red_team_attacks import BENIGN, Attack


def result(number, success, *, kind="reverse_exposure", by="judge", refused=False, category=None, text="x", **scores):
    attack = Attack(kind, "en", [{"role": "user", "content": str(number)}], "test", category=category)
    return Result(attack, AttackAnswer(text, number % 2 == 0, 3), "no" if refused else None, success, by, None, scores)


RESULTS = [
    *(result(n, n < 3, category="a" if n < 5 else "b", harmless=n / 10) for n in range(10)),
    result(10, True, by="secret", kind="prompt_leaking"),
    result(11, False, by="secret", kind="prompt_leaking", refused=True, text=" "),
    *(result(n, None, kind=BENIGN, by="", refused=n == 12, helpful=1.0) for n in range(12, 16)),
]


def test_counts_and_intervals_by_class_and_category():
    rows = report.summarize(RESULTS)
    reverse, leaking, benign, everything = rows["class"]
    assert (reverse.name, reverse.by) == ("reverse exposure", "judge")
    assert (reverse.success.count, reverse.success.of) == (3, 10)
    assert (reverse.success.low, reverse.success.high) == wilson(3, 10)
    assert (reverse.ended.count, reverse.refused.count, reverse.empty) == (5, 0, 0)
    assert reverse.scores == {"harmless": pytest.approx(0.45)}
    assert (leaking.success.count, leaking.refused.count, leaking.empty) == (1, 1, 1)
    assert (benign.success.of, benign.refused.count, benign.refused.of) == (0, 1, 4)
    assert (everything.success.count, everything.success.of, everything.by) == (4, 12, "as above")
    assert {row.name: (row.success.count, row.success.of) for row in rows["category"]} == {"a": (3, 5), "b": (0, 5)}
    assert [row.name for row in report.worst_categories(rows["category"])] == ["a", "b"]
    assert [row.ended.of for row in rows["language"]] == [16]


def test_facts_and_upper_bounds_are_not_added_up():
    unsure = result(20, True, by="no refusal", kind="other")
    assert report.summarize([*RESULTS, unsure])["class"][-1].success.of == 0
    assert report.summarize([unsure])["class"][-1].success.of == 1


def test_the_worst_come_first():
    # Known for sure by the lowest score, then upper bounds, then refused questions.
    unsure = result(20, True, by="no refusal", kind="other")
    assert report.worst([*RESULTS, unsure]) == [1, 11, 2, 3, 17, 13]


def test_changes_prompt_by_prompt():
    before = {r.attack.id: r for r in RESULTS[:-1]}
    after = [
        *(result(n, n == 9, harmless=1 - n / 10) for n in range(10)),
        *(result(n, False, by="secret", kind="prompt_leaking") for n in (10, 11)),
        *(result(n, None, kind=BENIGN, by="", helpful=2.0) for n in range(12, 16)),
    ]
    changes = {(one.measure, one.name): one for one in report.compare(before, after)}
    harmless = changes["harmless", "all"]
    assert (harmless.better, harmless.worse, harmless.equal) == (5, 4, 1) and harmless.p_value == sign_test(5, 4)
    assert (harmless.before, harmless.after) == (pytest.approx(0.45), pytest.approx(0.55))
    success = changes["attack success", "all"]  # fewer is better
    assert (success.better, success.worse, success.equal) == (4, 1, 7)
    leaking = changes["attack success", "prompt leaking"]
    assert (leaking.better, leaking.worse, leaking.p_value) == (1, 0, 1.0)
    refusal = changes["over-refusal", "all"]  # one question has no answer before
    assert (refusal.better, refusal.worse, len(refusal.pairs)) == (1, 0, 3)
    assert changes["helpful", "all"].better == 3 and ("helpful", "harmless look-alikes") not in changes
    assert report.compare({}, after) == []


def test_files_are_read_again(tmp_path):
    odd = result(30, True, text="one\u2028two\r\n three")
    path = tmp_path / "answers.jsonl"
    report.write_results(path, [*RESULTS, odd])
    assert report.read_answers(path) == {r.attack.id: r.answer for r in [*RESULTS, odd]}
    path.write_text('{"id": 3}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl:1 is not an answer that tools/red_team.py wrote"):
        report.read_answers(path)
    rows, changes = report.summarize(RESULTS), report.compare({r.attack.id: r for r in RESULTS}, RESULTS)
    report.write_report(tmp_path / "report.json", {"model": "m"}, rows, changes)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["model"] == "m" and found["class"][0]["success"]["count"] == 3 and "pairs" not in found["changes"][0]
    report.plot_shares(tmp_path / "a.png", {"before": rows["class"], "after": rows["class"]})
    assert report.plot_changes(tmp_path / "b.png", changes) and not report.plot_changes(tmp_path / "c.png", [])
    assert {p.name for p in tmp_path.glob("*.png")} == {"a.png", "b.png"}
    assert report.class_table(rows["class"], "t").row_count == 4 and report.change_table(changes, "t").row_count > 4
