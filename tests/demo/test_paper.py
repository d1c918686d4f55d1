"""The parts of `bc2 paper`: what they run can be typed, and what they say follows from their numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bc2_jax.demo import paper, paper_reading
from bc2_jax.demo.stage import stages_for


def test_every_part_can_be_run_alone() -> None:
    parts = paper.make_parts()
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    alone = [part.name for part in stages_for(parts, ["norm_head"])]
    assert alone == ["texts", "curate", "tokenizer", "norm_head"]
    assert [part.name for part in stages_for(parts, ["mfu"])] == ["mfu"]


def write_run(folder: Path, loss: float, **metrics: float) -> None:
    folder.mkdir(parents=True)
    lines = [{"step": 9, "cross_entropy": loss, **metrics}, {"step": 9, "validation_cross_entropy": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("alibi", "agrees"), [((5.0, 5.1), True), ((4.0, 4.1), False)])
def test_positions_agree_if_they_differ_less_than_seeds(tmp_path: Path, alibi: Any, agrees: bool) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "positions" / f"rope{seed}", 5.05 + 0.1 * seed)
        write_run(tmp_path / "positions" / f"alibi{seed}", alibi[seed])
    result = paper_reading.read_positions(tmp_path)
    assert result.figures["agrees"] is agrees
    assert ("as in the report" in result.sentences[0]) is agrees


@pytest.mark.parametrize(
    ("without", "words"),
    [(9.0, "as the report finds"), (5.1, "does not show"), (float("nan"), "as the report finds")],
)
def test_norm_head_is_judged_by_which_rates_work(tmp_path: Path, without: float, words: str) -> None:
    for rate in ("1e-2", "1e-1"):
        norms = {"head_row_norm_max": 2.0, "head_row_norm_mean": 1.0}
        write_run(tmp_path / "norm_head" / f"with_{rate}", 5.0, **norms)
        write_run(tmp_path / "norm_head" / f"without_{rate}", 5.0 if rate == "1e-2" else without, **norms)
    result = paper_reading.read_norm_head(tmp_path)
    assert words in result.sentences[0]
    assert [row[0] for row in result.tables[0].rows] == ["1e-2", "1e-1"]


@pytest.mark.parametrize(("sizes", "shrinks"), [((8.0, 6.0, 3.0), True), ((6.0, 8.0, 3.0), False)])
def test_max_z_is_judged_by_the_logits(tmp_path: Path, sizes: tuple[float, ...], shrinks: bool) -> None:
    found = {
        weight: {"largest_logit": size, "loss": 5.0, "penalties": {"1.05": {"kl": size / 100, "changed": 0.1}}}
        for weight, size in zip(("0", "2e-4", "1e-2"), sizes, strict=True)
    }
    (tmp_path / "max_z.json").write_text(json.dumps(found))
    (sentence,) = paper_reading.read_max_z(tmp_path).sentences
    assert ("as in the report" in sentence) is shrinks
    assert "less where logits are smaller" in sentence
