"""A model on disk, wherever it lies: found, loaded onto a mesh, saved as parameters alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from bc2_jax import manifest
from bc2_jax.checkpoint import TOKENIZER_NAME, is_complete, parse_model_config, read_metadata, save_context
from bc2_jax.config import ComputeConfig, DType, ModelConfig
from bc2_jax.convert import hf, orbax
from bc2_jax.convert.hf_config import read_config
from bc2_jax.convert.table import flatten, param_shapes, read_slice, unflatten
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.model.baichuan import Baichuan2, Params, abstract_params, param_shardings, split_model
from bc2_jax.validation import check_path

# Where several arrays are damaged Orbax raises the fault of one; of the others asyncio prints whole tracebacks.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@dataclasses.dataclass(frozen=True)
class FoundModel:
    """A model on disk of which nothing was read but its config."""

    path: Path
    """The PyTorch folder as it was given, or the absolute folder of one checkpoint."""
    format: Literal["pytorch", "orbax"]
    config: ModelConfig
    tokenizer: Path | None
    """tokenizer.model in a PyTorch folder; in a checkpoint's folder or its run's."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What was saved with a checkpoint; nothing in a PyTorch folder."""


def find_model(path: str | Path) -> FoundModel:
    """Finds the model at `path`: a folder in the released PyTorch layout, a bc2_jax checkpoint, or the newest complete
    checkpoint of a run (its folder, or the `checkpoints` folder in it).

    Raises FileNotFoundError if there is no model, and ValueError if its config is not valid, a checkpoint is damaged or
    has a link in it, or its path is none for Orbax (`validation.check_path`); in one sentence.
    """
    path = Path(path)
    if is_hf_folder(path):
        tokenizer = path / TOKENIZER_NAME
        return FoundModel(path, "pytorch", read_config(path), tokenizer if tokenizer.is_file() else None)
    checkpoint = _newest_checkpoint(path.absolute())
    if checkpoint is None:
        raise FileNotFoundError(_explain_absence(path))
    check_path("path", checkpoint)
    manifest.refuse_links(checkpoint)
    metadata = _read_metadata(checkpoint)
    return FoundModel(
        checkpoint, "orbax", parse_model_config(metadata, checkpoint), _tokenizer_near(checkpoint), metadata
    )


def _read_metadata(checkpoint: Path) -> dict[str, Any]:
    """The metadata of a checkpoint; one sentence, whatever is wrong with the JSON that Orbax reads it from."""
    file = checkpoint / "_CHECKPOINT_METADATA"
    try:
        json.loads(file.read_bytes())
        metadata = read_metadata(checkpoint)
        if not isinstance(metadata.get("generation"), dict | None):
            raise ValueError(f"generation = {metadata['generation']!r} is no generation config")
        return metadata
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: {orbax.explain(error)}.") from error


def find_tokenizer(path: str | Path) -> Path:
    """`tokenizer.model` of a model folder or run; raises FileNotFoundError if there is none.

    Needs no model: a run has its tokenizer before its first checkpoint.
    """
    path = Path(path)
    if (found := _tokenizer_near(path.absolute())) is None:
        reason = f"has no {TOKENIZER_NAME}, nor has its run" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {reason}.")
    return found


def load_pretrained(
    path: str | Path, *, dtype: DType = "float32", mesh: Mesh | None = None, compute: ComputeConfig | None = None
) -> Baichuan2:
    """The model in `path`: safetensors or .bin with config.json as released, or a checkpoint or run of ours.

    `dtype` is that of parameters and activations. With a mesh (`bc2_jax.sharding.make_mesh`) each device reads its own
    part of every parameter. `compute` sets the rest of how it runs. `model(input_ids)` gives fp32 logits [B, T, V].
    Raises FileNotFoundError or ValueError with one sentence if the folder is not a whole, consistent model.
    """
    params, config = load_params(path, dtype, mesh)
    compute = dataclasses.replace(compute or ComputeConfig(remat="none"), dtype=dtype)
    return nnx.merge(split_model(config, compute)[0], params)


def load_params(path: str | Path, dtype: DType = "float32", mesh: Mesh | None = None) -> tuple[Params, ModelConfig]:
    """Parameters, cast to `dtype`, and architecture of the model that `path` means to `find_model`.

    With a mesh each device reads its own part of every parameter; without one they are whole on the first device.
    Raises as `load_pretrained`.
    """
    found = find_model(path)
    load = _load_torch if found.format == "pytorch" else _load_orbax
    return load(found, dtype, mesh), found.config


def save_params(params: Params, config: ModelConfig, path: str | Path, tokenizer: Path | None = None) -> None:
    """Writes a params-only checkpoint of arrays in memory; an existing `path` is refused with FileExistsError.

    From files, `convert.conversion.to_orbax` does so one layer at a time.
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
    return (path / "config.json").is_file() and not _is_run(path)


def _is_run(path: Path) -> bool:
    """Whether `path` is the workdir of a training run, which writes a config.json too and its checkpoints later."""
    if (path / "checkpoints").is_dir():
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("model"), dict) and "optimizer" in config


def _newest_checkpoint(path: Path) -> Path | None:
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            steps = [p for p in folder.iterdir() if re.fullmatch("[0-9]+", p.name) and is_complete(p)]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    return path if is_complete(path) else None


def _explain_absence(path: Path) -> str:
    """The error message for a path without a model."""
    if not path.exists():
        return f"{path} does not exist."
    if not path.is_dir():
        return f"{path} is a file: give the folder of a model, of a checkpoint or of a run."
    if _is_run(path) or path.absolute().name == "checkpoints":
        return f"{path} has no checkpoint: its run has not completed one yet."
    if (path / "params").is_dir():
        return f"{path} is a checkpoint that is not complete: it was not written to its end, or files were removed."
    return f"{path} is not a model: it has no config.json and is neither a bc2_jax run nor a checkpoint."


def _tokenizer_near(path: Path) -> Path | None:
    """The tokenizer in `path` or, where that is RUN/checkpoints or RUN/checkpoints/STEP, in RUN.

    In no other folder above: the tokenizer there is another model's.
    """
    runs = [folder.parent for folder in (path, path.parent) if folder.name == "checkpoints"]
    return next((folder / TOKENIZER_NAME for folder in (path, *runs) if (folder / TOKENIZER_NAME).is_file()), None)


def _load_torch(found: FoundModel, dtype: DType, mesh: Mesh | None) -> Params:
    config = found.config
    tensors = hf.open_folder(found.path)
    hf.check_tensors(config, tensors)
    shardings = {} if mesh is None else flatten(param_shardings(config, mesh))

    def load(name: str, shape: tuple[int, ...]) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            return read_slice(config, lambda n: tensors[n].read(), name, index or ()).astype(jnp.dtype(dtype))

        return jax.make_array_from_callback(shape, shardings[name], read) if mesh else jnp.asarray(read(()))

    return unflatten({name: load(name, shape) for name, shape in param_shapes(config).items()})


def _load_orbax(found: FoundModel, dtype: DType, mesh: Mesh | None) -> Params:
    path = found.path
    if (path / manifest.MANIFEST_NAME).is_file():
        manifest.verify(path, jax.process_index(), jax.process_count(), below="params/")
    # What is wrong with the metadata is said better by our own reader of it.
    shapes = {name: array.shape for name, array in orbax.open_arrays(path).items()}
    hf.check_shapes(f"arrays of {path}", param_shapes(found.config), shapes)
    abstract = abstract_params(found.config, mesh, dtype)
    try:
        return ocp.load_checkpointables(path, {"params": abstract})["params"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"The parameters in {path} cannot be read, it is damaged or incomplete ({orbax.explain(error)})."
        ) from error
