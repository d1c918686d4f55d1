"""The JSON metadata of a checkpoint: config, position in the data, tokens trained on."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from bc2_jax.config import CheckpointConfig, ModelConfig
from bc2_jax.config.record import from_record

# Orbax logs every save at INFO, warns of what is normal on one host, and logs every exception that it also raises, once
# per thread: a full disk would print pages of tracebacks before our message.
logging.getLogger("absl").setLevel(logging.CRITICAL)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Metadata of a training checkpoint; JSON values."""

    config: dict[str, Any]
    """The resolved config of the run."""
    data: dict[str, Any]
    """Position in the batches (`Batches.position`)."""
    health: dict[str, Any] | None = None
    """State of the health monitor (`HealthMonitor.state`); None if the run had none."""
    job: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further values of this kind of run."""

    tokens: int = 0
    """Tokens trained on up to this step; 0 for a run that does not count tokens."""
    permanent: bool = False
    """Whether the checkpoint is never deleted."""

    def as_json(self) -> dict[str, Any]:
        """One flat dict; the values of `job` are merged into it."""
        return {**self.job, **{name: getattr(self, name) for name in _OWN}}

    @classmethod
    def from_json(cls, values: dict[str, Any], step: int) -> Metadata:
        """Inverse of `as_json` for the checkpoint of `step`; also reads metadata of earlier versions."""
        own = {name: values[name] for name in _OWN if name in values}
        job = {name: value for name, value in values.items() if name not in _OWN}
        return cls(**(own if "tokens" in own else own | _of_earlier_version(own, step)), job=job)


_OWN = ("config", "data", "health", "tokens", "permanent")


def _of_earlier_version(own: dict[str, Any], step: int) -> dict[str, Any]:
    """Values that earlier versions did not save; they follow from the config, since the batch size was constant."""
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
    """Whether `config` keeps the checkpoint of a step forever.

    True for multiples of `keep_every`, and for the first step after each `keep_every_tokens` trained tokens. `tokens`
    were trained on up to and including this step.
    """
    if config.keep_every and step % config.keep_every == 0:
        return True
    every = config.keep_every_tokens
    return bool(every) and step > 0 and tokens // every > (tokens - tokens_per_step) // every


def is_complete(path: Path) -> bool:
    """Whether `path` is a completely written checkpoint: Orbax writes its metadata last."""
    return (path / "_CHECKPOINT_METADATA").is_file() and (path / "params").is_dir()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint: `config`, and for a training checkpoint `data` and more."""
    metadata = ocp.checkpointables_metadata(path).custom_metadata
    config = metadata.get("config") if isinstance(metadata, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} is a checkpoint of another program: it has no bc2_jax config.")
    return metadata


def read_training_metadata(path: Path) -> Metadata:
    """Metadata of the training checkpoint in `path`, whose name is its step; ValueError for anything else."""
    values = read_metadata(path)
    try:
        return Metadata.from_json(values, int(path.name))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a training checkpoint of bc2_jax: its metadata lacks {error}.") from error


def parse_model_config(metadata: dict[str, Any], path: Path) -> ModelConfig:
    """The model config in the metadata of the checkpoint in `path`; ValueError if this version cannot read it."""
    try:
        return from_record(ModelConfig, metadata["config"]["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"The model config of {path} is not valid: {str(error).rstrip('.')}.") from error
