"""What a checkpoint says beside its arrays: the config, where the run was in its data, how far it had come."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from bc2_jax.config import CheckpointConfig, ModelConfig
from bc2_jax.config.record import from_record

# Orbax logs every save at INFO, warns of what is normal on one host, and logs as errors, thread by thread, what it also
# raises: a full disk would be pages of tracebacks before our sentence.
logging.getLogger("absl").setLevel(logging.CRITICAL)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What is saved with the arrays of a training checkpoint; JSON values."""

    config: dict[str, Any]
    """The resolved config of the run."""
    data: dict[str, Any]
    """Where the run is in its batches (`Batches.position`)."""
    health: dict[str, Any] | None = None
    """What the run knows of its health (`HealthMonitor.state`); None of a run that judged nothing."""
    job: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What its kind of run saves beside."""

    tokens: int = 0
    """Trained on up to this step, whatever the batches were; 0 of a run that is not counted in tokens."""
    permanent: bool = False
    """Whether the checkpoint is kept for ever."""

    def as_json(self) -> dict[str, Any]:
        """The values of `job` stand beside the others."""
        return {**self.job, **{name: getattr(self, name) for name in _OWN}}

    @classmethod
    def from_json(cls, values: dict[str, Any], step: int) -> Metadata:
        """Inverse of `as_json`, for the checkpoint of `step`; also of what earlier versions saved."""
        own = {name: values[name] for name in _OWN if name in values}
        job = {name: value for name, value in values.items() if name not in _OWN}
        return cls(**(own if "tokens" in own else own | _of_earlier_version(own, step)), job=job)


_OWN = ("config", "data", "health", "tokens", "permanent")


def _of_earlier_version(own: dict[str, Any], step: int) -> dict[str, Any]:
    """What was not saved, but followed from the config, as batches had one size from the first step on."""
    config, data, health = own["config"], own["data"], own.get("health")
    if health and "skipped_batches" in health:
        data = {"skipped_batches": health["skipped_batches"], **data}
    rows, tokens = config.get("data", {}).get("global_batch_size", 0), config.get("data", {}).get("sequence_length", 0)
    saved = from_record(CheckpointConfig, config.get("checkpoint", {}))
    return {
        "data": {"batch_size": rows, "row_tokens": tokens, **data},
        "tokens": step * rows * tokens, "permanent": is_permanent(saved, step, step * rows * tokens, rows * tokens),
    }  # fmt: skip


def is_permanent(config: CheckpointConfig, step: int, tokens: int, tokens_per_step: int) -> bool:
    """Whether `config` keeps for ever the checkpoint of a step, with which `tokens` have been trained on: multiples of
    `keep_every`, and each first step at which another `keep_every_tokens` have been.
    """
    if config.keep_every and step % config.keep_every == 0:
        return True
    every = config.keep_every_tokens
    return bool(every) and step > 0 and tokens // every > (tokens - tokens_per_step) // every


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint that was written to its end: Orbax writes its metadata last."""
    return (path / "_CHECKPOINT_METADATA").is_file() and (path / "params").is_dir()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata saved with a checkpoint: `config`, and `data` if it is a training checkpoint."""
    metadata = ocp.checkpointables_metadata(path).custom_metadata
    config = metadata.get("config") if isinstance(metadata, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} is a checkpoint of another program: it has no bc2_jax config.")
    return metadata


def read_training_metadata(path: Path) -> Metadata:
    """What was saved with the training checkpoint in `path`, which is named by its step; ValueError if it is none."""
    values = read_metadata(path)
    try:
        return Metadata.from_json(values, int(path.name))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a training checkpoint of bc2_jax: its metadata lacks {error}.") from error


def parse_model_config(metadata: dict[str, Any], path: Path) -> ModelConfig:
    """The architecture in the metadata of a checkpoint in `path`; ValueError if it is not one that this version has."""
    try:
        return from_record(ModelConfig, metadata["config"]["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"The model config of {path} is not valid: {str(error).rstrip('.')}.") from error
