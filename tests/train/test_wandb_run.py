"""Metrics on W&B, by a module that records what it is told."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bc2_jax.train import loop, pretrain
from bc2_jax.train.wandb_run import ID_NAME


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = SimpleNamespace(name="wandb")  # type: ignore[assignment]  # what find_spec asks for
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.finished = 0
        self.error: Exception | None = None

    def Settings(self, **values: Any) -> dict[str, Any]:  # noqa: N802  # as it is called there
        return values

    def init(self, **values: Any) -> FakeWandb:
        self.started.append(values)
        if self.error is not None:
            raise self.error
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def train(config: Any, **changes: Any) -> Any:
    return loop.run(dataclasses.replace(config, **changes), pretrain.make_job)


def test_a_resumed_run_continues_the_same_one(small_run, wandb, tmp_path):
    changes = {"workdir": str(tmp_path / "run"), "wandb_project": "tests"}
    train(small_run, num_steps=2, **changes)
    assert [values["step"] for values in wandb.logged if "loss" in values][-1] == 2
    assert all(values["grad_norm"] > 0 for values in wandb.logged if "grad_norm" in values)
    (first,) = wandb.started
    name = (tmp_path / "run" / ID_NAME).read_text()
    assert (first["project"], first["id"], first["resume"]) == ("tests", name, "allow") and name.isalnum()
    assert first["config"]["optimizer"] == dataclasses.asdict(small_run.optimizer)
    assert wandb.finished == 1
    assert wandb.metrics == [("step", None), ("*", "step")]
    train(small_run, num_steps=3, resume="auto", **changes)
    assert [start["id"] for start in wandb.started] == [name] * 2
    assert {values["step"] for values in wandb.logged} == {0, 1, 2, 3}


def test_the_run_does_without(small_run, wandb, tmp_path, caplog):
    wandb.error = RuntimeError("no connection")
    result = train(small_run, num_steps=2, workdir=str(tmp_path / "run"), wandb_project="tests")
    assert result.step == 2 and len(wandb.started) == 1  # it is not tried at every step
    assert "wandb failed (no connection)" in caplog.text


def test_it_is_not_imported_without_a_project(small_run, wandb, tmp_path):
    train(small_run, num_steps=1, workdir=str(tmp_path / "run"))
    assert wandb.started == [] and not (tmp_path / "run" / ID_NAME).exists()


def test_the_extra_is_asked_for_before_anything_is_written(small_run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb_project = 'tests' is not valid here: it needs pip"):
        train(small_run, workdir=str(tmp_path / "run"), wandb_project="tests")
    assert not (tmp_path / "run").exists()
