"""A resumed run restores its state beside the compilation of its step."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import pytest

from bc2_jax import checkpoint
from bc2_jax.config import TrainConfig
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.train import loop, pretrain, startup
from bc2_jax.train.goodput import read_sessions


@pytest.fixture(scope="module")
def half(small_run, tmp_path_factory) -> Path:
    """The folder of a run of the first 4 of its 8 steps; to be copied."""
    folder = tmp_path_factory.mktemp("half") / "run"
    return pretrain.train(dataclasses.replace(small_run, workdir=str(folder), num_steps=4)).workdir


def resumed(config: TrainConfig, half: Path, folder: Path) -> TrainConfig:
    shutil.copytree(half, folder)
    return dataclasses.replace(config, workdir=str(folder), resume="auto", num_steps=5)


def test_the_restore_and_the_compilation_wait_for_each_other_only_at_the_end(
    small_run, half, tmp_path, monkeypatch, capsys
):
    """Each begins before the other has ended: one after the other would wait here forever."""
    restoring, compiling = threading.Event(), threading.Event()
    load, make = checkpoint.load_state, startup.lower_train_step

    def load_beside(*arguments):
        restoring.set()
        assert compiling.wait(60)
        return load(*arguments)

    def lower_beside(*arguments, **options):
        compiling.set()
        assert restoring.wait(60)
        return make(*arguments, **options)

    monkeypatch.setattr(checkpoint, "load_state", load_beside)
    monkeypatch.setattr(startup, "lower_train_step", lower_beside)
    result = pretrain.train(resumed(small_run, half, tmp_path / "run"))
    assert result.step == 5
    phases = read_sessions(result.workdir / "goodput.jsonl")[-1]["start_up"]
    beside, alone = {"restore", "batch", "lower", "compile"}, {"imports", "mesh", "data", "checkpoint", "first step"}
    assert beside | alone | {"total"} <= phases.keys()
    assert sum(phases[name] for name in alone) < phases["total"]
    assert 0 < phases["compile"] < phases["total"]
    assert capsys.readouterr().out.count("start-up: ") == 1


@pytest.mark.parametrize("compiles", [True, False])
def test_a_checkpoint_that_cannot_be_read_is_the_error_and_changes_nothing(
    small_run, half, tmp_path, monkeypatch, compiles
):
    """The sentence is that of the restore, whether the compilation beside it succeeds or comes first to fail."""
    config = resumed(small_run, half, tmp_path / "run")
    before = {path: path.read_bytes() for path in Path(config.workdir).rglob("*") if path.is_file()}

    def fail(*_):
        raise DamagedCheckpoint("params/x is damaged: it cannot be read.")

    def no_step(*_):
        raise ValueError("the step cannot be compiled")

    monkeypatch.setattr(checkpoint, "load_state", fail)
    if not compiles:
        monkeypatch.setattr(loop, "compile_step", no_step)
    with pytest.raises(DamagedCheckpoint, match="^params/x is damaged: it cannot be read.$"):
        pretrain.train(config)
    after = {path: path.read_bytes() for path in Path(config.workdir).rglob("*") if path.is_file()}
    assert after == before


def test_an_error_of_the_compilation_is_raised_as_it_is(small_run, half, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("the step cannot be lowered")

    monkeypatch.setattr(startup, "lower_train_step", fail)
    with pytest.raises(ValueError, match="^the step cannot be lowered$"):
        pretrain.train(resumed(small_run, half, tmp_path / "run"))
