"""The report of a reward model: intervals, groups, lengths; the tool from a reward model and pairs to a table."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from bc2_jax.align.intervals import wilson_of_share
from bc2_jax.align.reward_report import JudgedPair, read_class, read_gap, summarize
from bc2_jax.align.scoring import Scorer
from bc2_jax.align.taxonomy import load_taxonomy
from bc2_jax.checkpoint import save_context
from bc2_jax.config import ModelConfig
from bc2_jax.model.reward import backbone_of
from tests.convert.models import random_params

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "reward_report.py"))["main"]
TAXONOMY = load_taxonomy()
MODEL = ModelConfig(
    hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, position_embedding="rope",
    vocab_size=490, model_max_length=64,
)  # fmt: skip


def wilson(right: float, count: int) -> tuple[float, float]:
    return wilson_of_share(right / count if count else 0.0, count, z=1.959964)


def test_intervals_are_wilsons():
    assert wilson(0, 0) == (0, 1)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_an_interval_solves_its_equation(count: int, data):
    right = data.draw(st.sampled_from([0, count]) | st.integers(0, 2 * count).map(lambda n: n / 2))
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for p in (low, high):
        assert count * (right / count - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p), abs=1e-6)


def pair(chosen=1.0, rejected=0.0, lengths=(3, 2), name=None, gap=None) -> JudgedPair:
    return JudgedPair(chosen, rejected, *lengths, name, gap)


def test_groups():
    pairs = [
        pair(name="physics", gap=1), pair(0, 1, name="Physics", gap=1.2), pair(0, 0, name="生物", gap=5),
        pair(2, 1, (1, 4), "knowledge", 2.5), pair(0, 1, (2, 2), "made up", -1), pair(gap=None),
    ]  # fmt: skip
    report = summarize(pairs, TAXONOMY)
    assert (report.overall.pairs, report.overall.ties, report.overall.value) == (6, 1, 3.5 / 6)
    assert report.overall.longer_wins == pytest.approx((1 + 1 + 1 + 0 + 0.5 + 1) / 6)
    assert {name: a.pairs for name, a in report.by_class[1].items()} == {"knowledge": 4}
    assert {name: a.pairs for name, a in report.by_class[2].items()} == {"natural_science": 3}
    assert {name: (a.pairs, a.value) for name, a in report.by_class[3].items()} == {
        "physics": (2, 0.5), "biology": (1, 0.5)
    }  # fmt: skip
    assert {name: a.pairs for name, a in report.unknown.items()} == {"made up": 1, "no class": 1}
    gaps = {name: a.pairs for name, a in report.by_gap.items()}
    assert gaps == {"-1": 1, "1": 2, "3": 1, "5": 1, "no gap": 1} and list(gaps)[0] == "-1"
    assert report.lengths["chosen"] == 2.5 and report.lengths["rejected"] == pytest.approx(14 / 6)
    assert report.lengths["agreement"] == pytest.approx((1 + 0 + 0.5 + 0 + 1) / 5)
    assert report.rewards["chosen_mean"] == pytest.approx(4 / 6)
    assert json.loads(json.dumps(report.as_json()))["by_class"]["3"]["physics"]["pairs"] == 2


def test_what_a_record_says():
    assert read_class({"class": " physics ", "category": "x"}) == "physics"
    assert read_class({"category": "x"}) == read_class({"class": "", "category": "x"}) == "x"
    assert read_class({"class": ["knowledge", "physics"]}) == "physics"
    assert read_class({"topic": 3}, ("topic",)) == "3"
    assert read_class({}) is read_class({"class": None}) is read_class({"class": {}}) is None
    assert read_gap({"gap": "2"}) == 2 and read_gap({"gap": 3, "score_chosen": 9, "score_rejected": 1}) == 3
    assert read_gap({"score_chosen": 4, "score_rejected": 1.5}) == 2.5
    assert read_gap({"a": 4, "b": 1}, scores=("a", "b")) == 3
    for record in ({}, {"gap": None}, {"gap": True}, {"gap": "much"}, {"gap": float("nan")}, {"score_chosen": 1}):
        assert read_gap(record) is None


@pytest.fixture(scope="module")
def places(tmp_path_factory, small_tokenizer) -> tuple[Path, Path]:
    """A run of a reward model and a file of pairs."""
    folder = tmp_path_factory.mktemp("report")
    params = backbone_of(random_params(MODEL, np.float32)) | {"score": {"weight": np.linspace(-1, 1, 16, dtype="f4")}}
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    metadata = {"config": {"model": dataclasses.asdict(MODEL), "reward": {}}}
    with save_context():
        ocp.save_checkpointables(run / "checkpoints" / "5", {"params": params}, custom_metadata=metadata)
    (run / "tokenizer.model").write_bytes(Path(small_tokenizer.path).read_bytes())
    records = [
        {"prompt": "the cat", "chosen": "sat on the mat", "rejected": "the log", "class": "physics", "gap": 1},
        {"prompt": "the dog", "chosen": "the log", "rejected": "on the mat", "category": "no such", "gap": 5},
        {"prompt": "a", "chosen": "the cat " * 80, "rejected": "dog", "score_chosen": 5, "score_rejected": 2},
        {"prompt": "the cat " * 80, "chosen": "sat", "rejected": "dog"},
        {"prompt": "x", "completion": "y"},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run, folder / "pairs.jsonl"


def test_the_tool(places, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run, pairs = places
    picture, file = tmp_path / "a.png", tmp_path / "a.json"
    assert TOOL([str(run), str(pairs), "--picture", str(picture), "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "not in the taxonomy: no such" in out and "Physics 物理" not in out and "Natural science 自然科学" in out
    assert "54.5%" in out and "81.5%" in out and "left out" in err and "cut: 1 pairs" in err
    assert picture.stat().st_size > 0
    report = json.loads(file.read_text("utf-8"))
    assert (report["overall"]["pairs"], report["left_out"], report["cut"]) == (3, 2, 1)
    assert report["by_gap"].keys() == {"1", "3", "5"}
    scorer = Scorer.load(run)
    answers = [[{"role": "user", "content": "the cat"}, {"role": "assistant", "content": a}]
               for a in ("sat on the mat", "the log")]  # fmt: skip
    chosen, rejected = scorer.score_messages(answers)
    assert report["by_gap"]["1"]["value"] == float(chosen > rejected)
    folder = tmp_path / "rows"  # as packed pairs are
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "pairs.jsonl").write_bytes(pairs.read_bytes())
    assert TOOL([str(run), str(folder), "--limit", "1", "--picture", str(picture), "--json", str(file)]) == 0
    assert json.loads(file.read_text("utf-8"))["overall"]["pairs"] == 1


def test_what_the_tool_refuses(places, tmp_path, capsys):
    run, pairs = places
    (tmp_path / "none.jsonl").write_text("{}\n")
    for arguments, told in (
        ([str(run)], "RM and PAIRS are needed"),
        ([str(tmp_path / "x"), str(pairs)], "does not exist"),
        ([str(run), str(tmp_path / "none.jsonl")], "no preference pair"),
        ([str(run), str(pairs), "--taxonomy", str(pairs)], "is not a taxonomy"),
    ):
        assert TOOL(arguments) == 1
        assert told in capsys.readouterr().err


def test_a_plan_is_csv(capsys):
    assert TOOL(["--plan", "1000"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "class,zh,en,quota,prompts"
    assert sum(int(line.rsplit(",", 1)[1]) for line in lines) == 1000 and len(lines) == 210
