"""The kinds of run: the type of a config, and the module whose functions know the kind."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Protocol

from bc2_jax.config import DPOConfig, FineTuneConfig, RewardConfig, RLConfig, RunConfig, TrainConfig
from bc2_jax.config.record import from_record

# By name: a kind may stand anywhere in the package, and a config is read before anything is loaded that it needs.
KINDS: dict[type[RunConfig], str] = {
    TrainConfig: "bc2_jax.train.pretrain",
    FineTuneConfig: "bc2_jax.align.sft",
    RewardConfig: "bc2_jax.align.reward",
    DPOConfig: "bc2_jax.align.dpo",
    RLConfig: "bc2_jax.align.rl",
}


EVALUATION = "bc2_jax.evaluate.in_loop"
"""Asks benchmarks during a run; it stands below this module, and is loaded where `evaluate.tasks` names some."""


class Kind(Protocol):
    """The functions of such a module."""

    def complete(self, config: Any) -> Any:
        """The config with what depends on its data filled in. Raises ValueError or OSError, naming the field."""

    def make_job(self, config: Any, start: Any) -> Any:
        """`bc2_jax.train.job.Job` of a run, from its `loop.Start`."""

    def make_step(self, config: Any, mesh: Any) -> Any:
        """`bc2_jax.train.job.StepParts`."""


def kind_of(config: RunConfig) -> Kind:
    """The module of a config's kind."""
    return importlib.import_module(KINDS[type(config)])  # type: ignore[return-value]  # a module stands for a Kind


def with_tasks(config: RunConfig, start: Any, job: Any) -> Any:
    """`job`, whose evaluations also ask the benchmarks of `config.evaluate`. Raises ValueError or FileNotFoundError for
    benchmarks that cannot be asked."""
    return importlib.import_module(EVALUATION).with_tasks(config, start, job) if config.evaluate.tasks else job


def type_of_record(record: dict[str, Any]) -> type[RunConfig] | None:
    """The type of the config that a run wrote down: the first that has all of its fields, as a run writes every field.
    None for a record of another version, which has others."""
    fitting = (kind for kind in KINDS if record.keys() <= {field.name for field in dataclasses.fields(kind)})
    return next(fitting, None)


def read_config(record: dict[str, Any]) -> Any:
    """The config that a run wrote down. Raises as `from_record`."""
    return from_record(type_of_record(record) or TrainConfig, record)
