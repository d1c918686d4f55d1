"""What is printed and written of a ladder, by the tool as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bc2_jax.cli import scaling_law

ROOT = Path(__file__).parents[3]
POINTS = ROOT / "tests" / "golden" / "evals" / "scaling" / "points.csv"


def call(*args: object) -> None:
    assert scaling_law.main([str(arg) for arg in args]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a call says that ends with an error."""
    assert scaling_law.main([str(arg) for arg in args]) == 1
    return capsys.readouterr().err


def test_what_is_not_known_is_null_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Four runs, one far off: their interval has no upper end, and without N there is no surface."""
    monkeypatch.setattr("bc2_jax.evaluate.scaling.analysis.draw_analysis", lambda analysis, path: None)
    points, out = tmp_path / "p.csv", tmp_path / "out"
    points.write_text("C,loss\n1e20,3.2\n3e20,4.5\n1e21,2.85\n3e21,2.75\n")
    call("--points", points, "--out", out)
    record = json.loads((out / "scaling.json").read_text(), parse_constant=pytest.fail)
    assert record["runs"][0]["N"] is None
    assert record["parameters_95"]["a"][1] is None
    said = refusal(capsys, "--points", points, "--law", "surface")
    assert "law = 'surface' is not valid: a surface needs N and D" in said


def test_predictions_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    call(
        "--points", POINTS, "--fit-on", "paper_form:h", "--compare", "paper_form:[17]",
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
        (("a", "--noise", "0.1"), "--noise is an option of --plan"),
        (("a", "--chip", "v4"), "--chip is an option of --plan"),
        (("--plan", "100", "--out", "x"), "--out has no effect with --plan"),
        (("--plan", "100", "--noise", "0.5"), "--noise = 0.5 is not valid"),
        (("--plan", "100", "--predict", "70b"), "--predict 70b"),
        (("--plan", "-1"), "--plan = -1"),
        (("--plan", "100", "--chip", "v9"), "--chip = 'v9' is not valid: legal values are v4"),
        (("--points", POINTS, "--predict", "70b"), "--predict 70b"),
        (("--points", POINTS, "--fit-on", "13B"), "the number of runs = 1"),
        (("missing",), "no config.json"),
    ),
)
def test_what_is_wrong_is_named(args: tuple, message: str, capsys: pytest.CaptureFixture[str]):
    assert message in refusal(capsys, *args)
