from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest

from bc2_jax.files import InUse
from bc2_jax.train.start import own_workdir


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chosen(config) -> str:
    with own_workdir(config) as workdir:
        return str(workdir)


def test_default_workdirs_never_collide(small_run, here: Path):
    auto = dataclasses.replace(small_run, resume="auto")
    assert chosen(small_run) == chosen(auto) == "runs/test"
    assert list(here.iterdir()) == []
    (here / "runs/test/checkpoints").mkdir(parents=True)
    assert chosen(small_run) == "runs/test"
    (here / "runs/test/checkpoints/4").mkdir()
    assert chosen(small_run) == "runs/test-2"
    assert chosen(auto) == "runs/test"


def test_starts_at_the_same_time_have_different_workdirs_before_one_has_saved(small_run, here: Path):
    with contextlib.ExitStack() as live:
        names = [str(live.enter_context(own_workdir(small_run))) for _ in range(3)]
        assert names == ["runs/test", "runs/test-2", "runs/test-3"]
    assert list(here.iterdir()) == []


def test_a_live_run_is_neither_resumed_nor_shared(small_run, here: Path):
    auto = dataclasses.replace(small_run, resume="auto")
    with (
        own_workdir(small_run),
        pytest.raises(InUse, match="^workdir = 'runs/test' is in use by process"),
        own_workdir(auto),
    ):
        pass
    named = dataclasses.replace(auto, workdir="elsewhere")
    with own_workdir(named), pytest.raises(InUse, match="^workdir = 'elsewhere' is in use"), own_workdir(named):
        pass
    # The last with checkpoints is what auto means, though a later run of the same name has begun.
    (here / "runs/test/checkpoints/4").mkdir(parents=True)
    with own_workdir(small_run) as second:
        assert str(second) == "runs/test-2"
        assert chosen(auto) == "runs/test"


def test_a_home_folder_is_written_as_in_a_shell(small_run, here: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    assert chosen(dataclasses.replace(small_run, workdir="~/run")) == str(here / "home/run")
