"""Reading a model from wherever it is: a folder in the released PyTorch layout or a checkpoint of ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bc2_jax import checkpoint
from bc2_jax.config import ComputeConfig, DType, ModelConfig
from bc2_jax.convert import hf
from bc2_jax.convert.hf_config import read_config
from bc2_jax.convert.source import find_checkpoint, is_hf_folder
from bc2_jax.convert.table import flatten, param_shapes, read_slice, unflatten
from bc2_jax.model.baichuan import Baichuan2, Params, param_shardings, split_model


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


def read_model_config(path: str | Path) -> ModelConfig:
    """The architecture of the model in `path`. Raises as `load_pretrained`."""
    path = Path(path)
    return read_config(path) if is_hf_folder(path) else checkpoint.read_model_config(find_checkpoint(path))


def load_params(path: str | Path, dtype: DType, mesh: Mesh | None) -> tuple[Params, ModelConfig]:
    """Parameters and architecture of the model in `path`, straight onto the mesh. Raises as `load_pretrained`."""
    path = Path(path)
    if not is_hf_folder(path):
        return checkpoint.load_params(find_checkpoint(path), mesh, dtype)
    config = read_config(path)
    tensors = hf.open_folder(path)
    hf.check_tensors(config, tensors)
    shardings = {} if mesh is None else flatten(param_shardings(config, mesh))

    def load(name: str, shape: tuple[int, ...]) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            return read_slice(config, lambda n: tensors[n].read(), name, index or ()).astype(jnp.dtype(dtype))

        return jax.make_array_from_callback(shape, shardings[name], read) if mesh else jnp.asarray(read(()))

    return unflatten({name: load(name, shape) for name, shape in param_shapes(config).items()}), config


def find_tokenizer(path: str | Path) -> Path:
    """`tokenizer.model` of a model folder or run; raises FileNotFoundError if there is none."""
    path = Path(path)
    found = checkpoint.find_tokenizer(path)
    if found is None:
        raise FileNotFoundError(f"{path} has no {checkpoint.TOKENIZER_NAME}, nor has its run.")
    return found
