"""Finds and loads adapters on disk: PEFT folders and bc2_jax checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bc2_jax.config import ModelConfig
from bc2_jax.config.lora import LoraConfig
from bc2_jax.config.record import from_record
from bc2_jax.convert import hf, orbax
from bc2_jax.convert.checkpoints import (
    explain_reward_model,
    holds_reward_model,
    newest_checkpoint,
    open_metadata,
    open_params,
    policy_part,
)
from bc2_jax.convert.peft import is_peft_folder, load_peft, open_peft
from bc2_jax.convert.table import flatten, unflatten
from bc2_jax.metadata import parse_model_config
from bc2_jax.model.baichuan import Params
from bc2_jax.model.lora import Adapter, abstract_adapter


@dataclasses.dataclass(frozen=True)
class FoundAdapter:
    """An adapter on disk; only its config has been read."""

    path: Path  # the PEFT folder as given, or the absolute folder of one checkpoint
    config: LoraConfig | None  # none for a PEFT folder, whose targets are known only from its tensors
    model: ModelConfig | None  # architecture of the base model; None for a PEFT folder, which does not record it
    base: str | None  # path of the base model at training time, if known
    part: str = ""  # its part of the checkpoint's parameters (`checkpoints.policy_part`)

    def explain(self) -> str:
        """Error message for an adapter in place of a model: what it is, and how to use it."""
        base, name = self.base or "BASE", f" for {self.base}" if self.base else ", which needs the model it was made of"
        return (
            f"{self.path} is a LoRA adapter{name}: merge the two with `python tools/convert.py merge-lora {base} "
            f"{self.path} OUT`, or load them together with load_pretrained({base!r}, adapter={str(self.path)!r})."
        )


def find_adapter(path: str | Path) -> FoundAdapter | None:
    """The adapter in `path`, a PEFT folder or a LoRA run or checkpoint; None if there is none.

    Raises ValueError if it cannot be read or belongs to a reward model.
    """
    path = Path(path)
    checkpoint = newest_checkpoint(path.absolute())
    if checkpoint is None:
        return FoundAdapter(path, None, None, open_peft(path).base) if is_peft_folder(path) else None
    metadata = open_metadata(checkpoint)
    if holds_reward_model(metadata):
        raise ValueError(explain_reward_model(checkpoint))
    return adapter_of(checkpoint, metadata)


def adapter_of(checkpoint: Path, metadata: Mapping[str, Any]) -> FoundAdapter | None:
    """The adapter in a checkpoint with this metadata; None if it holds a whole model."""
    if (lora := lora_config(checkpoint, metadata)) is None:
        return None
    base = metadata["config"].get("init_from")
    model = parse_model_config(dict(metadata), checkpoint)
    return FoundAdapter(checkpoint, lora, model, base if isinstance(base, str) else None, policy_part(metadata))


def lora_config(checkpoint: Path, metadata: Mapping[str, Any]) -> LoraConfig | None:
    """The LoRA config in a checkpoint's metadata; None if it trained no adapter. Raises ValueError if it is invalid."""
    record = metadata["config"].get("lora")
    if not isinstance(record, dict) or not record.get("rank"):
        return None
    try:
        return from_record(LoraConfig, record, "lora.")
    except (TypeError, ValueError) as error:
        raise ValueError(f"The adapter config of {checkpoint} is not valid: {str(error).rstrip('.')}.") from error


def require_adapter(path: str | Path) -> FoundAdapter:
    """`find_adapter`; raises ValueError if there is none."""
    found = find_adapter(path)
    if found is None:
        reason = "it has no adapter_config.json and is not a LoRA run or checkpoint"
        raise ValueError(f"{path} is not an adapter: {reason}.")
    return found


def load_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """Loads the adapter in `path` (`find_adapter`) for a model of `config`, as fp32 numpy arrays.

    Raises FileNotFoundError or ValueError as `load_peft`, also if its arrays do not fit the model.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist.")
    found = require_adapter(path)
    if found.config is None:
        return load_peft(path, config)
    return read_adapter(open_params(found.path, part=found.part), found.config, config, found.path)


def read_adapter(arrays: Mapping[str, Any], lora: LoraConfig, config: ModelConfig, checkpoint: Path) -> Adapter:
    """The adapter in a checkpoint's arrays, in fp32; ValueError if they do not fit the model."""
    expected = {name: array.shape for name, array in flatten(abstract_adapter(lora, config, None)).items()}
    hf.check_shapes(f"arrays of {checkpoint}", expected, {name: array.shape for name, array in arrays.items()})
    flat = {name: np.asarray(orbax.read_part(array, None), np.float32) for name, array in arrays.items()}
    return Adapter(lora, unflatten(flat))


def place_adapter(adapter: Adapter, config: ModelConfig, mesh: Mesh | None) -> Params:
    """The adapter's arrays on `mesh`, sharded as the weights, or whole on the first device."""

    def place(shape: jax.ShapeDtypeStruct, array: Any) -> jax.Array:
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: np.asarray(array)[index])

    return jax.tree.map(place, abstract_adapter(adapter.config, config, mesh), adapter.params)


def describe(found: FoundAdapter) -> tuple[str, ...]:
    lines: tuple[str, ...] = (f"adapter of {found.base or 'a model that is not named'}: {found.path}",)
    if found.part:
        lines += (f"that of the {found.part} of a run of reinforcement learning; all else stays in the checkpoint",)
    if found.config is not None:
        return (*lines, found.config.describe())
    raw = open_peft(found.path).raw
    keys = "target_modules r lora_alpha use_rslora use_dora rank_pattern alpha_pattern"
    return (*lines, "PEFT, " + ", ".join(f"{key} {raw[key]}" for key in keys.split() if raw.get(key)))
