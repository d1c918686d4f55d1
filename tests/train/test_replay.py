"""Replayed steps: identical, or which number differs and why."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.config import BAICHUAN2_7B, MixtureStage, SourceConfig, TrainConfig
from bc2_jax.config.record import from_record
from bc2_jax.data.loader import make_train_loader
from bc2_jax.train import pretrain

main = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "replay.py"))["main"]


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory) -> Path:
    return pretrain.train(
        dataclasses.replace(small_run, workdir=str(tmp_path_factory.mktemp("replay") / "run"))
    ).workdir


@pytest.fixture
def changed(finished, tmp_path):
    """A copy of the run's record with a metric of a step set to another value, and the run's checkpoints."""

    def change(step: int, **values) -> Path:
        (tmp_path / "checkpoints").symlink_to(finished / "checkpoints")
        (tmp_path / "config.json").symlink_to(finished / "config.json")
        lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.update(values if line["step"] == step else {})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path

    return change


def test_a_step_is_identical(finished, capsys):
    assert main([str(finished), "--step", "8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line[:17] for line in out[:4]] == [f"step {s}: identical" for s in range(5, 9)]
    assert out[4] == "identical" and "parameters sha256" in out[3] and "grad_norm" in out[2]


def test_a_checkpoint_says_where_to_start(finished, capsys):
    assert main([str(finished / "checkpoints" / "4"), "--step", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_one_bit_is_seen(finished, changed, capsys):
    line = next(m for m in map(json.loads, (finished / "metrics.jsonl").open()) if m["step"] == 5)
    assert (
        main([str(changed(5, loss=float(np.nextafter(np.float32(line["loss"]), np.float32(9))))), "--step", "5"]) == 1
    )
    out = capsys.readouterr().out
    assert "step 5: different" in out and "  loss: recorded" in out and "with the same batch: a hardware error" in out
    assert "grad_norm" not in out


def test_another_batch_is_told_from_bad_hardware(finished, small_run, tmp_path, capsys):
    loader = make_train_loader(small_run.data, process_index=0, process_count=1)
    np.savez(tmp_path / "same.npz", **loader[4], step=5)
    np.savez(tmp_path / "other.npz", **loader[3], step=5)
    assert main([str(finished), "--step", "5", "--batch", str(tmp_path / "same.npz")]) == 0
    assert main([str(finished), "--step", "5", "--batch", str(tmp_path / "other.npz")]) == 1
    assert "the batch differs; look at the data" in capsys.readouterr().out


def test_what_is_missing_is_one_sentence(finished, changed, tmp_path, capsys):
    np.savez(tmp_path / "b.npz", step=7)
    for arguments, message in (
        (["--step", "4"], "has no checkpoint before it"),
        (["--step", "9"], "step 9 is not recorded in"),
        (["--step", "5", "--batch", str(tmp_path / "b.npz")], "b.npz' is not valid: it has no input_ids"),
        (["--step", "5", "--batch", str(tmp_path / "none.npz")], "No such file"),
    ):
        assert main([str(finished), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_record_of_a_config_gives_the_config(small_run):
    data = dataclasses.replace(
        small_run.data, stages=(MixtureStage(start_tokens=10**6, weights=(2.0,)),),
        sources=(SourceConfig(path="rows", quality_weights=(0.5, 1.0)),),
    )  # fmt: skip
    for config in (small_run, dataclasses.replace(small_run, data=data, model=BAICHUAN2_7B)):
        record = json.loads(json.dumps(dataclasses.asdict(config)))
        assert from_record(TrainConfig, record) == config
        del record["health"]  # as before there was such a field
        assert from_record(TrainConfig, record) == config
    with pytest.raises(ValueError, match="data.colour = 'red' is not valid: this version has no such field"):
        from_record(TrainConfig, record | {"data": record["data"] | {"colour": "red"}})
    with pytest.raises(ValueError, match="data.accumulation_steps = 3 is not valid"):
        from_record(TrainConfig, record | {"data": record["data"] | {"accumulation_steps": 3}})
