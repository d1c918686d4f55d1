"""Checkpoints with Orbax: asynchronous, atomic, restorable on any mesh.

A checkpoint is a folder with the items `params` (fp32 nested dict named as the model) and `opt_state`, and as its
metadata the resolved config and the data iterator's state: all that a bit-exact resume needs. A params-only checkpoint
has just `params` and the model config.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from bc2_jax.config import CheckpointConfig, ModelConfig
from bc2_jax.model.baichuan import Params, param_shardings, split_model

TOKENIZER_NAME = "tokenizer.model"

# Small enough that a device of a pod reads little more than its part, large enough for a disk or an object store.
CHUNK_BYTES = 64 << 20

# Orbax logs every save at INFO and warns of what is normal on one host.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpointer:
    """The checkpoints of one run, in DIRECTORY/STEP."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        self.directory = directory.absolute()
        # What a killed run left half-written never counts as a checkpoint. Removed here: Orbax does it in a thread that
        # outlives an error at the start and then fails at the end of the program.
        if jax.process_index() == 0:
            for half in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half)
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            context=_save_context(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        return [step for step in steps if is_complete(self.directory / str(step))]

    def save(self, step: int, params: Params, opt_state: Any, metadata: dict[str, Any]) -> None:
        """Starts writing and returns as soon as the arrays may change; waits for the save before it, if any."""
        self._checkpointer.wait()
        self._checkpointer.save_checkpointables_async(
            step, {"params": params, "opt_state": opt_state}, force=True, custom_metadata=metadata
        )

    def metadata(self, step: int) -> dict[str, Any]:
        return read_metadata(self.directory / str(step))

    def restore(self, step: int, params: Params, opt_state: Any) -> tuple[Params, Any]:
        """The arrays of a step, laid out as the abstract trees (ShapeDtypeStructs with shardings) given."""
        items = self._checkpointer.load_checkpointables(step, {"params": params, "opt_state": opt_state})
        return items["params"], items["opt_state"]

    def last_good(self) -> Path | None:
        """The newest complete checkpoint, saves that are under way included."""
        self.wait()
        return max((self.directory / str(step) for step in self.steps()), key=lambda p: int(p.name), default=None)

    def delete(self, step: int) -> None:
        """Removes a checkpoint that must not be resumed from; returns when it is gone."""
        self._checkpointer.delete(step)

    def wait(self) -> None:
        """Returns when every save is complete on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def _save_context() -> ocp.Context:
    """Each layer of a stacked array is stored in chunks of its own, so that a conversion can read layer by layer."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def storage(path: tuple, value: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions:
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return options(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else None)

    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = storage
    return context


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint that was written to its end: Orbax writes its metadata last."""
    return (path / "_CHECKPOINT_METADATA").is_file() and (path / "params").is_dir()


def is_params_only(path: Path) -> bool:
    """Whether `path` is a complete checkpoint of parameters alone, which can be made again from a model."""
    return is_complete(path) and not (path / "opt_state").exists()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run's or a checkpoints folder."""
    path = Path(path).absolute()
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            steps = [p for p in folder.iterdir() if p.name.isdigit() and is_complete(p)]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    if is_complete(path):
        return path
    raise FileNotFoundError(f"{path} is no checkpoint and holds none: give a run's folder or a checkpoint's.")


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata saved with a checkpoint: `config`, and `data` if it is a training checkpoint."""
    metadata = ocp.checkpointables_metadata(path).custom_metadata
    if not isinstance(metadata, dict) or "model" not in metadata.get("config", {}):
        raise ValueError(f"{path} is a checkpoint of another program: it has no bc2_jax config.")
    return metadata


def read_model_config(path: Path) -> ModelConfig:
    """The architecture saved with a checkpoint. Raises ValueError for fields this version does not know or misses."""
    fields = read_metadata(path)["config"]["model"]
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"The model config of {path} has fields this version does not know: {', '.join(unknown)}.")
    return ModelConfig(**fields)


def abstract_params(config: ModelConfig, mesh: Mesh | None, dtype: str = "float32") -> Params:
    """Shapes and shardings of the parameters, on `mesh` or on one device; what they are restored onto."""
    _, shapes, _ = split_model(config)
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one_device, shapes) if mesh is None else param_shardings(config, mesh)
    return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s), shapes, shardings)


def load_params(path: str | Path, mesh: Mesh | None = None, dtype: str = "float32") -> tuple[Params, ModelConfig]:
    """Parameters and architecture of a checkpoint (see `find_checkpoint`), on `mesh` or on one device."""
    path = find_checkpoint(path)
    config = read_model_config(path)
    abstract = abstract_params(config, mesh, dtype)
    try:
        return ocp.load_checkpointables(path, {"params": abstract})["params"], config
    except (ValueError, KeyError) as error:
        # What is wrong with an array is the cause of what Orbax raises.
        cause = error.__cause__ or error.__context__ or error
        raise ValueError(f"The parameters in {path} cannot be read, it is damaged or incomplete ({cause}).") from error


def load_state(path: Path, params: Params, opt_state: Any) -> tuple[Params, Any]:
    """The arrays of a training checkpoint, laid out as the abstract trees given; only reads."""
    items = ocp.load_checkpointables(path, {"params": params, "opt_state": opt_state})
    return items["params"], items["opt_state"]


def save_params(params: Params, config: ModelConfig, path: str | Path, tokenizer: Path | None = None) -> None:
    """Writes a params-only checkpoint of arrays in memory; an existing `path` is refused with FileExistsError.

    From files, `convert.conversion.to_orbax` does so one layer at a time.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists.")
    metadata = {"config": {"model": dataclasses.asdict(config)}}
    with _save_context():
        ocp.save_checkpointables(path, {"params": params}, custom_metadata=metadata)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, path / TOKENIZER_NAME)


def find_tokenizer(path: str | Path) -> Path | None:
    """`tokenizer.model` beside a checkpoint: in its folder or in its run's."""
    path = Path(path).absolute()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / TOKENIZER_NAME).is_file():
            return folder / TOKENIZER_NAME
    return None
