"""The kinds of run: config type -> the module that implements it."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Protocol

from bc2_jax.config import DPOConfig, FineTuneConfig, RewardConfig, RLConfig, RunConfig, TrainConfig
from bc2_jax.config.record import from_record

# By name: a config is read before the modules that it needs are imported.
KINDS: dict[type[RunConfig], str] = {
    TrainConfig: "bc2_jax.train.pretrain",
    FineTuneConfig: "bc2_jax.align.sft",
    RewardConfig: "bc2_jax.align.reward",
    DPOConfig: "bc2_jax.align.dpo",
    RLConfig: "bc2_jax.align.rl",
}


class Kind(Protocol):
    """The functions of such a module."""

    def complete(self, config: Any) -> Any:
        """Fills in config fields that depend on the data. Raises ValueError or OSError, naming the field."""

    def make_job(self, config: Any, start: Any) -> Any:
        """The `train.job.Job` of a run, from its `loop.Start`."""

    def make_step(self, config: Any, mesh: Any) -> Any:
        """The `train.job.StepParts`."""


def kind_of(config: RunConfig) -> Kind:
    """The module of a config."""
    return importlib.import_module(KINDS[type(config)])  # type: ignore[return-value]  # a module stands for a Kind


def with_tasks(config: RunConfig, start: Any, job: Any) -> Any:
    """`job` whose evaluations also run the benchmarks of `config.evaluate`.

    Raises ValueError or FileNotFoundError for benchmarks that cannot run.
    """
    if not config.evaluate.tasks:
        return job
    return importlib.import_module("bc2_jax.evaluate.in_loop").with_tasks(config, start, job)


def type_of_record(record: dict[str, Any]) -> type[RunConfig] | None:
    """The type of a config read from JSON: the first with all of its fields, since a run writes every field.

    None if no type has them, as for a record of another version.
    """
    fitting = (kind for kind in KINDS if record.keys() <= {field.name for field in dataclasses.fields(kind)})
    return next(fitting, None)


def read_config(record: dict[str, Any]) -> Any:
    """The config that a run saved. Raises as `from_record`."""
    return from_record(type_of_record(record) or TrainConfig, record)
