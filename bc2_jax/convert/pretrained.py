"""Finds a model on disk in any format, loads it onto a mesh, and saves parameters."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from bc2_jax.checkpoint import TOKENIZER_NAME, save_context
from bc2_jax.config import ComputeConfig, DType, ModelConfig
from bc2_jax.convert import hf, orbax, quantized
from bc2_jax.convert.adapter import adapter_of, find_adapter, load_adapter, place_adapter
from bc2_jax.convert.checkpoints import (
    explain_quantized,
    explain_reward_model,
    holds_reward_model,
    newest_checkpoint,
    open_metadata,
    open_params,
    policy_part,
    quantized_scheme,
)
from bc2_jax.convert.hf_config import read_config
from bc2_jax.convert.hub import local_model
from bc2_jax.convert.peft import is_peft_folder
from bc2_jax.convert.reading import AS_SAID, Reading
from bc2_jax.convert.table import Shape, flatten, param_shapes, unflatten
from bc2_jax.convert.weights import check_weights
from bc2_jax.metadata import is_complete, parse_model_config
from bc2_jax.model.baichuan import Baichuan2, Params, param_shardings, split_model
from bc2_jax.model.lora import with_adapter
from bc2_jax.validation import check_path


@dataclasses.dataclass(frozen=True)
class FoundModel:
    """A model on disk; only its config has been read."""

    path: Path
    """The PyTorch folder as given, or the absolute folder of one checkpoint."""
    format: Literal["pytorch", "orbax"]
    config: ModelConfig
    tokenizer: Path | None
    """tokenizer.model of a PyTorch folder, or in the folder of a checkpoint or its run."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Metadata of a checkpoint; empty for a PyTorch folder."""
    part: str = ""
    """Its part of the checkpoint's parameters (`checkpoints.policy_part`)."""

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are quantized (`convert/quantized.py`); then it can only be run."""
        return quantized_scheme(self.metadata) is not None

    @property
    def is_reward_model(self) -> bool:
        """Whether it has a score instead of a language model's head (`convert/reward.py` loads it)."""
        return bool(self.metadata) and holds_reward_model(self.metadata)


def find_model(path: str | Path, reading: Reading = AS_SAID) -> FoundModel:
    """Finds the model at `path`: a PyTorch folder in Baichuan's or LLaMA's layout, a bc2_jax checkpoint, a run (its
    folder or its `checkpoints` folder), of which it takes the newest complete checkpoint, or a PyTorch folder on the
    Hugging Face hub by its id (`hub.local_model`). From reinforcement learning it takes the actor.

    Raises FileNotFoundError if there is no model, and ValueError for a reward model or an adapter, an invalid config, a
    checkpoint that is damaged or contains a link, or a path that Orbax cannot use (`validation.check_path`).
    """
    found = find_any_model(path, reading)
    if found.is_reward_model:
        raise ValueError(explain_reward_model(found.path))
    return found


def find_any_model(path: str | Path, reading: Reading = AS_SAID) -> FoundModel:
    """`find_model`, which also finds reward models; their parameters may be an adapter and a score."""
    path = local_model(path)
    if is_hf_folder(path):
        tokenizer = path / TOKENIZER_NAME
        return FoundModel(path, "pytorch", read_config(path, reading), tokenizer if tokenizer.is_file() else None)
    checkpoint = newest_checkpoint(path.absolute())
    if checkpoint is None:
        raise FileNotFoundError(_explain_absence(path))
    if reading != AS_SAID:
        raise ValueError(
            f"{path} is a bc2_jax checkpoint, which records how to read it; {reading} applies to PyTorch folders only."
        )
    metadata = open_metadata(checkpoint)
    if not holds_reward_model(metadata) and (adapter := adapter_of(checkpoint, metadata)) is not None:
        raise ValueError(adapter.explain())
    return FoundModel(
        checkpoint, "orbax", parse_model_config(metadata, checkpoint), _tokenizer_near(checkpoint), metadata,
        policy_part(metadata),
    )  # fmt: skip


def find_tokenizer(path: str | Path) -> Path:
    """The `tokenizer.model` of a model folder or run; raises FileNotFoundError if there is none.

    Works before a run has its first checkpoint.
    """
    path = local_model(path)
    if (found := _tokenizer_near(path.absolute())) is None:
        reason = f"has no {TOKENIZER_NAME}, nor has its run" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {reason}.")
    return found


def load_pretrained(
    path: str | Path, *, dtype: DType = "float32", mesh: Mesh | None = None, compute: ComputeConfig | None = None,
    reading: Reading = AS_SAID, adapter: str | Path | None = None,
) -> Baichuan2:  # fmt: skip
    """Loads the model in `path`: safetensors or .bin with config.json as released, or a checkpoint or run.

    `dtype` is that of parameters and activations. With a mesh (`bc2_jax.sharding.make_mesh`) each device reads its own
    shard. `compute` has the other compute options, `reading` how to read a folder whose files do not say so. `adapter`
    is a PEFT folder or a LoRA checkpoint or run; it is kept separate from the weights. `model(input_ids)` returns fp32
    logits [B, T, V]. For a model written by tools/quantize.py, `dtype` is that of activations; it cannot be trained and
    takes no adapter. Raises FileNotFoundError or ValueError if a folder is not a complete, consistent model or adapter.
    """
    compute = dataclasses.replace(compute or ComputeConfig(remat="none"), dtype=dtype)
    found = find_model(path, reading)
    if found.is_quantized and adapter is None:
        return quantized.load(found.path, found.config, found.metadata, compute, mesh)
    params, config = load_params(path, dtype, mesh, reading)
    model = nnx.merge(split_model(config, compute)[0], params)
    if adapter is None:
        return model
    loaded = load_adapter(adapter, config)
    return with_adapter(model, loaded.config, place_adapter(loaded, config, mesh))


def load_params(
    path: str | Path, dtype: DType = "float32", mesh: Mesh | None = None, reading: Reading = AS_SAID
) -> tuple[Params, ModelConfig]:
    """Parameters, cast to `dtype`, and config of the model in `path` (`find_model`).

    With a mesh each device reads its own shard; without one they are whole on the first device. Raises as
    `load_pretrained`.
    """
    found = find_model(path, reading)
    shardings = None if mesh is None else flatten(param_shardings(found.config, mesh))
    return place_params(param_shapes(found.config), shardings, dtype, open_reader(found, reading)), found.config


def save_params(params: Params, config: ModelConfig, path: str | Path, tokenizer: Path | None = None) -> None:
    """Writes a params-only checkpoint of arrays in memory; raises FileExistsError if `path` exists.

    `convert.conversion.to_orbax` does so from files, one layer at a time.
    """
    path = Path(path).absolute()
    check_path("path", path)
    if path.exists():
        raise FileExistsError(f"{path} exists.")
    metadata = {"config": {"model": dataclasses.asdict(config)}}
    with save_context():
        ocp.save_checkpointables(path, {"params": params}, custom_metadata=metadata)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, path / TOKENIZER_NAME)


def is_hf_folder(path: Path) -> bool:
    """Whether `path` is a model folder in a PyTorch layout, not a bc2_jax checkpoint or run."""
    return (path / "config.json").is_file() and not _is_run(path) and not is_complete(path)


def _is_run(path: Path) -> bool:
    """Whether `path` is the workdir of a training run, which has a config.json too."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        return True
    is_torch = isinstance(config, dict) and "model_type" in config
    return (path / "checkpoints").is_dir() and not is_torch


def _explain_absence(path: Path) -> str:
    """The error message for a path without a model."""
    if not path.exists():
        return f"{path} does not exist."
    if not path.is_dir():
        return f"{path} is a file: give the folder of a model, of a checkpoint or of a run."
    if is_peft_folder(path):
        adapter = find_adapter(path)
        assert adapter is not None
        return adapter.explain()
    if _is_run(path) or path.absolute().name == "checkpoints":
        return f"{path} has no checkpoint: its run has not completed one yet."
    if (path / "params").is_dir():
        return f"{path} is a checkpoint that is not complete: it was not written to its end, or files were removed."
    return f"{path} is not a model: it has no config.json and is neither a bc2_jax run nor a checkpoint."


def _tokenizer_near(path: Path) -> Path | None:
    """The tokenizer in `path`, or in RUN if that is RUN/checkpoints or RUN/checkpoints/STEP.

    Not in other parent folders, whose tokenizer belongs to another model.
    """
    runs = [folder.parent for folder in (path, path.parent) if folder.name == "checkpoints"]
    return next((folder / TOKENIZER_NAME for folder in (path, *runs) if (folder / TOKENIZER_NAME).is_file()), None)


Read = Callable[[str, tuple[slice, ...]], np.ndarray]
"""(path, index) -> that part of the array; all of it for an empty index."""


def open_reader(found: FoundModel, reading: Reading = AS_SAID) -> Read:
    """Returns a function that reads the parameters of a language model, after checking them against its config.

    Raises ValueError for a quantized model.
    """
    if found.is_quantized:
        raise ValueError(explain_quantized(found.path))
    if found.format == "pytorch":
        tensors = hf.read_folder(found.path, reading.strip_prefix)
        return check_weights(found.path, found.config, tensors, reading).read_slice
    arrays = open_params(found.path, jax.process_index(), jax.process_count(), found.part)
    return reader_of(arrays, param_shapes(found.config), found.path)


def reader_of(arrays: Mapping[str, Any], shapes: Mapping[str, Shape], checkpoint: Path) -> Read:
    """Returns a function that reads arrays of a checkpoint (`open_params`), after checking their `shapes`."""
    hf.check_shapes(f"arrays of {checkpoint}", shapes, {name: array.shape for name, array in arrays.items()})
    return lambda name, index: orbax.read_part(arrays[name], index or None)


def place_params(shapes: Mapping[str, Shape], shardings: Mapping[str, Any] | None, dtype: DType, read: Read) -> Params:
    """Parameters of these `shapes` in `dtype`; each device reads its shard, or all are whole on the first device."""

    def load(name: str, shape: Shape) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            return read(name, index or ()).astype(jnp.dtype(dtype), copy=False)

        return jax.make_array_from_callback(shape, shardings[name], part) if shardings else jnp.asarray(part(()))

    return unflatten({name: load(name, shape) for name, shape in shapes.items()})
