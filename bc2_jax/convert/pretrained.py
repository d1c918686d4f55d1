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
    path = Path(path)
    if (path / "config.json").is_file() and not (path / "checkpoints").is_dir():
        config = hf.read_config(path)
        params = _load_hf_params(path, config, dtype, mesh)
    else:
        params, config = checkpoint.load_params(path, mesh, dtype)
    compute = dataclasses.replace(compute or ComputeConfig(remat="none"), dtype=dtype)
    return nnx.merge(split_model(config, compute)[0], params)


def _load_hf_params(folder: Path, config: ModelConfig, dtype: DType, mesh: Mesh | None) -> Params:
    tensors = hf.open_folder(folder)
    hf.check_tensors(config, tensors)
    shardings = {} if mesh is None else flatten(param_shardings(config, mesh))

    def load(name: str, shape: tuple[int, ...]) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            return read_slice(config, lambda n: tensors[n].read(), name, index or ()).astype(jnp.dtype(dtype))

        return jax.make_array_from_callback(shape, shardings[name], read) if mesh else jnp.asarray(read(()))

    return unflatten({name: load(name, shape) for name, shape in param_shapes(config).items()})


def find_tokenizer(path: str | Path) -> Path:
    """`tokenizer.model` of a model folder or run; raises FileNotFoundError if there is none."""
    path = Path(path)
    found = checkpoint.find_tokenizer(path)
    if found is None:
        raise FileNotFoundError(f"{path} has no {checkpoint.TOKENIZER_NAME}, nor has its run.")
    return found
