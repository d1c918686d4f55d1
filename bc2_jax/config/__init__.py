"""Typed, validated configuration of a run, as frozen dataclasses.

Field names follow the released `config.json` where it has the field. An illegal value raises ValueError with one
sentence: field, value, and what is legal.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bc2_jax.config.compute import ComputeConfig, DType
from bc2_jax.config.data import DataConfig, MixtureStage, SourceConfig
from bc2_jax.config.distributed import DistributedConfig
from bc2_jax.config.evaluate import EvaluateConfig
from bc2_jax.config.finetune import TOKENIZER_OF_BASE, AskedConfig, FineTuneConfig, QuestionsConfig, TunedConfig
from bc2_jax.config.health import HealthConfig
from bc2_jax.config.lora import LORA_TARGETS, LoraConfig, LoraTarget
from bc2_jax.config.mesh import MeshConfig, check_divisible
from bc2_jax.config.model import BAICHUAN2_7B, BAICHUAN2_13B, ModelConfig
from bc2_jax.config.preference import DPOConfig, DPOOptions, PreferenceLoss, RewardConfig, RewardOptions
from bc2_jax.config.rl import PPOConfig, RLConfig
from bc2_jax.config.run import CheckpointConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "BAICHUAN2_13B",
    "BAICHUAN2_7B",
    "LORA_TARGETS",
    "TOKENIZER_OF_BASE",
    "AskedConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "DType",
    "DataConfig",
    "DistributedConfig",
    "EvaluateConfig",
    "FineTuneConfig",
    "HealthConfig",
    "LoraConfig",
    "LoraTarget",
    "MeshConfig",
    "MixtureStage",
    "ModelConfig",
    "OptimizerConfig",
    "QuestionsConfig",
    "RunConfig",
    "SampleConfig",
    "SourceConfig",
    "TrainConfig",
    "check_divisible",
    "differing_fields",
    "TunedConfig",
    "DPOConfig",
    "DPOOptions",
    "PreferenceLoss",
    "RewardConfig",
    "RewardOptions",
    "PPOConfig",
    "RLConfig",
]


def differing_fields(a: DataclassInstance, b: DataclassInstance, prefix: str = "") -> list[str]:
    """Lines "field: x against y" for every field in which two configs of one class differ."""
    lines = []
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            lines += differing_fields(x, y, f"{prefix}{field.name}.")
        elif x != y:
            lines.append(f"{prefix}{field.name}: {x!r} against {y!r}")
    return lines
