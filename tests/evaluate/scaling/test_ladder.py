"""The configs of ladders: every rung's schedule ends at its own last step; what a ladder costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from bc2_jax.config import TrainConfig
from bc2_jax.config.file import read_config_file
from bc2_jax.evaluate.scaling import plan
from bc2_jax.evaluate.scaling.ladder import RUNGS, make_target

CONFIGS = Path(__file__).parents[3] / "configs" / "scaling"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_each_schedule_ends_at_its_own_last_step(path: Path):
    config = read_config_file(path, TrainConfig).config
    assert config.optimizer.decay_steps == config.num_steps
    assert config.model.intermediate_size == 3 * config.model.hidden_size
    if path.stem != "tiny_ladder":
        assert path.stem == f"paper_h{config.model.hidden_size}"
        assert config.num_steps * config.tokens_per_step == pytest.approx(1e12, rel=1e-5)


def test_the_small_rungs_are_typed_as_they_are_meant():
    """Also where the command line changed the ladder."""
    file = read_config_file(CONFIGS / "tiny_ladder.py", TrainConfig)
    names = file.names
    changed = dataclasses.replace(
        file.config, seed=3, num_steps=7, ngram_baselines=True,
        optimizer=dataclasses.replace(file.config.optimizer, decay_steps=7, warmup_steps=2),
    )  # fmt: skip
    for rung in names["RUNGS"][:-1]:
        expected = names["as_rung"](changed, rung)
        typed = names["arguments"](expected, file.config, "")
        assert tyro.cli(TrainConfig, default=file.config, args=typed) == expected
        assert not names["is_ladder"](expected)
    data = changed.data
    other = dataclasses.replace(changed, data=dataclasses.replace(data, sources=(*data.sources, *data.sources)))
    with pytest.raises(ValueError, match=r"data\.sources can't be handed"):
        names["arguments"](other, file.config, "")


def test_a_rung_of_another_ladder_is_not_taken(tmp_path: Path):
    file = read_config_file(CONFIGS / "tiny_ladder.py", TrainConfig)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(file.config)))
    file.names["require_same"](tmp_path, file.config)
    with pytest.raises(ValueError, match="another num_steps than this ladder's: give --workdir"):
        file.names["require_same"](tmp_path, dataclasses.replace(file.config, num_steps=7))


def test_what_a_ladder_costs_and_tells(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_DRAWS", 1)
    said: list[str] = []
    costs = plan.cost_rungs("v5p", 1e12, lambda hidden, chip: (0.4, "here"), said.append)
    assert [cost.hidden for cost in costs] == list(RUNGS)
    expected = [628, 1481, 2301, 4903, 10957, 18766, 33692]
    assert [cost.chip_hours for cost in costs] == pytest.approx(expected, rel=2e-3)
    assert len(said) == 14
    choices = plan.choose([costs[i] for i in (0, 1, 3, 4, 6)], make_target("13b", 2.6e12), seed=1)
    assert [len(choice.rungs) for choice in choices] == [4, 5]
    assert choices[0].width > choices[1].width > 0
    assumed = plan.cost_rungs("v5e", 1e12, lambda hidden, chip: None)
    assert {(cost.mfu, cost.is_compiled) for cost in assumed} == {(plan.ASSUMED_MFU, False)}


def test_targets():
    assert pytest.approx(2.1983e23, rel=1e-3) == make_target(" 13B", 2.6e12).C
    by_file = make_target(str(CONFIGS.parent / "baichuan2_7b.py"), 2.6e12)
    assert dataclasses.replace(by_file, name="7b") == dataclasses.replace(make_target("7b", 2.6e12), loss=by_file.loss)
