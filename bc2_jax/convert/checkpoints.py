"""Finds checkpoints in a run's folder and reads their metadata and array headers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bc2_jax import manifest
from bc2_jax.config import ModelConfig
from bc2_jax.convert import orbax
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.metadata import is_complete, read_metadata
from bc2_jax.validation import check_path

ACTOR, CRITIC = "actor", "critic"
"""The two models trained by reinforcement learning; names of their parts of `params`."""


def newest_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint of a run (its folder or `checkpoints` in it), or `path` if it is one."""
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            steps = [p for p in folder.iterdir() if re.fullmatch("[0-9]+", p.name) and is_complete(p)]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    return path if is_complete(path) else None


def open_metadata(checkpoint: Path) -> dict[str, Any]:
    """The metadata of a checkpoint. Raises ValueError for an invalid path or metadata."""
    check_path("path", checkpoint)
    manifest.refuse_links(checkpoint)
    file = checkpoint / "_CHECKPOINT_METADATA"
    try:
        json.loads(file.read_bytes())
        metadata = read_metadata(checkpoint)
        if not isinstance(metadata.get("generation"), dict | None):
            raise ValueError(f"generation = {metadata['generation']!r} is not a generation config")
        return metadata
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: {orbax.explain(error)}.") from error


def model_metadata(
    config: ModelConfig, generation: Mapping[str, Any] | None, chat_template: str | None, **others: Any
) -> dict[str, Any]:
    """The metadata of a checkpoint of parameters alone."""
    metadata = {"config": {"model": dataclasses.asdict(config)}, **others, "generation": generation}
    return metadata if chat_template is None else metadata | {"chat_template": chat_template}


def policy_part(metadata: Mapping[str, Any]) -> str:
    """The part of `params` with the language model or its adapter: ACTOR in reinforcement learning, else "" (all)."""
    return ACTOR if isinstance(metadata["config"].get("ppo"), dict) else ""


def holds_reward_model(metadata: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's run trains a reward model."""
    return isinstance(metadata["config"].get("reward"), dict)


def explain_reward_model(checkpoint: Path) -> str:
    """Error message for a reward model in place of a language model: what it is, and how to use it."""
    return (
        f"{checkpoint} is a reward model, which scores conversations and writes no text: measure it with `python "
        f"tools/reward_report.py {checkpoint} PAIRS`, score with bc2_jax.align.scoring.Scorer, train with it by "
        f"--ppo.reward-model {checkpoint}, or train it further by --init-from of a run of a reward model; for PyTorch, "
        f"`python tools/convert.py to-hf {checkpoint} OUT --layout llama` writes it."
    )


def quantized_scheme(metadata: Mapping[str, Any]) -> Any:
    """The quantization record in a checkpoint's metadata; None if it is not quantized."""
    return metadata.get("quantized")


def explain_quantized(checkpoint: Path) -> str:
    """Error message where a quantized model's original weights are needed."""
    return (
        f"{checkpoint} is a quantized model: it can generate, be served and be evaluated, but cannot be trained, "
        "converted or given an adapter; use the model that it was made from."
    )


def take_part(arrays: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The arrays in a `part` of `params`, by their path inside it; all of them for ""."""
    prefix = f"{part}." if part else ""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def describe_rest(arrays: Mapping[str, Any], part: str) -> tuple[str, ...]:
    """Names of the other parts of `params`, for a conversion's list of what it leaves out."""
    prefix = f"{part}." if part else ""
    return tuple(sorted({f"params/{name.split('.')[0]}" for name in arrays if not name.startswith(prefix)}))


def open_params(checkpoint: Path, process: int = 0, count: int = 1, part: str = "") -> dict[str, Any]:
    """Path -> array of a checkpoint's parameters, or of a `part` of them (`take_part`), verified by its manifest if
    there is one.

    Raises `manifest.DamagedCheckpoint`. Not through Orbax, which reports only one of several damaged arrays and prints
    tracebacks for the others.
    """
    if (checkpoint / manifest.MANIFEST_NAME).is_file():
        manifest.verify(checkpoint, process, count, below="params/")
    return take_part(orbax.open_arrays(checkpoint), part)
