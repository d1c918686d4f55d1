"""What is printed and written of a ladder, by the tool as a user types it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
POINTS = ROOT / "tests" / "golden" / "evals" / "scaling" / "points.csv"


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling_law.py", *map(str, args)])
    runpy.run_path(str(ROOT / "tools" / "scaling_law.py"), run_name="__main__")


def test_predictions_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    call(
        monkeypatch, "--points", POINTS, "--fit-on", "paper_form:h", "--compare", "paper_form:[17]",
        "--predict", "13b", "--out", tmp_path,
    )  # fmt: skip
    text = capsys.readouterr().out
    places = [text.index(part) for part in ("Predicted from 7 runs", "Leaving out the largest", "h1216", "parameter")]
    assert places == sorted(places)
    assert "2.64169" in text
    assert "+0.98%" in text
    assert "written:" in text
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert record["parameters"]["b"] == pytest.approx(-0.13074, abs=1e-5)
    by_name = {p["name"]: p for p in record["predictions"]}
    assert by_name["13b"]["loss"] == pytest.approx(by_name["paper_form:13B"]["loss"], rel=1e-4)
    assert by_name["13b"]["actual"] is None
    assert (tmp_path / "scaling.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("args", "message"),
    (
        ((), "give the folders of runs"),
        (("a", "--points", POINTS), "give the folders of runs"),
        (("a", "--compare", "x"), "rows of --points"),
        (("a", "--noise", "0.1"), "--plan"),
        (("--plan", "-1"), "--plan = -1"),
        (("--plan", "100", "--chip", "v9"), "--chip = 'v9' is not valid: legal values are v4"),
        (("--points", POINTS, "--predict", "70b"), "--predict 70b"),
        (("--points", POINTS, "--fit-on", "13B"), "the number of runs = 1"),
        (("missing",), "no config.json"),
    ),
)
def test_what_is_wrong_is_named(args: tuple, message: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, *args)
