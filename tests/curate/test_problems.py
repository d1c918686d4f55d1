from __future__ import annotations

import json
import pickle

from bc2_jax.curate.problems import LISTED, UnitReport, excerpt, number_lines, problems_table


def report(unit: int, lines: int, *problems: tuple[int, int]) -> UnitReport:
    result = UnitReport(unit, lines=lines)
    for line, byte in problems:
        result.add("f", "bad", line=line, byte=byte)
    return result


def test_lines_are_numbered_through_the_units_of_a_file():
    reports = [
        (report(0, 10, (3, 30)), "a", 0),
        (report(1, 5, (1, 100), (0, -1)), "a", 100),
        (report(2, 0), "a", 200),
        (report(3, 2, (2, 310)), "a", 300),
        (report(4, 7, (4, 5)), "b", 0),
        # A row of parquet is absolute already.
        (report(5, 0, (99, -1)), "c", 3),
    ]
    numbered = number_lines(reports)
    assert [[p.line for p in r.problems] for r in numbered] == [[3], [11, 0], [], [17], [4], [99]]
    # What was given stays as it was.
    assert reports[1][0].problems[0].line == 1


def test_all_problems_are_counted_and_some_are_listed():
    result = UnitReport(7)
    for i in range(LISTED + 10):
        result.add("f", "bad", line=i + 1, rows=2)
    result.add("f", "worse", rows=0)
    assert result.reasons == {"bad": LISTED + 10, "worse": 1}
    assert result.lost["bad"] == 2 * (LISTED + 10) and result.lost["worse"] == 0
    assert len(result.problems) == LISTED
    assert pickle.loads(pickle.dumps(result)) == result
    assert UnitReport.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_table():
    table = problems_table([report(0, 1), report(2, 1, (1, 0))])
    assert table.to_pylist() == [
        {"unit": 2, "file": "f", "line": 1, "byte": 0, "reason": "bad", "rows": 1, "excerpt": ""}
    ]
    assert problems_table([]).schema == table.schema


def test_excerpts_are_safe_to_print():
    assert excerpt(b"\x1b[31mred\xff\n") == "\\x1b[31mred\\xff\\n"
    assert excerpt("文" * 100) == "文" * 60 + "..."
    assert excerpt(b"") == ""
    assert excerpt(None) == "None"
    assert excerpt("\u202eabc") == "\\u202eabc"
