"""Tiny random models in both layouts, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf, table
from bc2_jax.convert.hf_write import write_folder
from bc2_jax.convert.safetensors import write_safetensors
from bc2_jax.convert.source import open_source, source_of_params
from bc2_jax.convert.stream import Stream

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ModelConfig(
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    position_embedding="rope",
    vocab_size=24,
)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def random_params(config: ModelConfig, dtype: type, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = table.param_shapes(config)
    return table.unflatten({path: rng.standard_normal(shape).astype(dtype) for path, shape in shapes.items()})


def from_torch(config: ModelConfig, get_tensor: Callable[[str], np.ndarray]) -> dict:
    """Our nested dict, in the dtype of the PyTorch tensors that `get_tensor` gives by their names."""
    return table.unflatten({rule.path: table.read_slice(config, get_tensor, rule.path) for rule in table.TABLE})


def read_params(folder: Path, config: ModelConfig) -> dict:
    """Our nested dict of numpy arrays from a folder that needs no config.json, in the dtype of its files."""
    tensors = hf.open_folder(folder)
    hf.check_tensors(config, tensors)
    return from_torch(config, lambda name: tensors[name].read())


def write_tensors(folder: Path, files: dict[str, dict[str, np.ndarray]], index: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for file, tensors in files.items():
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        dtype = next(iter(tensors.values())).dtype
        write_safetensors(folder / file, dtype, shapes, tensors.items())
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def write_by_dtype(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The tensors as one shard for each dtype, which `write_safetensors` needs."""
    kinds = sorted({str(array.dtype) for array in tensors.values()})
    shards = {f"model-{i:05}-of-{len(kinds):05}.safetensors": kind for i, kind in enumerate(kinds, 1)}
    files = {
        file: {name: array for name, array in tensors.items() if str(array.dtype) == kind}
        for file, kind in shards.items()
    }
    return write_tensors(folder, files)


def tiny_tensors(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in table.torch_shapes(TINY).items()}


def tensor_bytes(folder: Path) -> dict[str, tuple]:
    arrays = {name: tensor.read() for name, tensor in hf.open_folder(folder).items()}
    return {name: (a.shape, a.dtype, a.tobytes()) for name, a in arrays.items()}


def tree_bytes(params: dict) -> dict[str, tuple]:
    return {path: (a.shape, a.dtype, a.tobytes()) for path, a in table.flatten(params).items()}


def random_folder(folder: Path, config: ModelConfig = TINY, dtype: str = "float32", seed: int = 0, **options) -> Path:
    """A folder in a PyTorch layout with random weights; `options` are those of `write_folder`."""
    source = source_of_params(random_params(config, np.float32, seed), config)
    write_folder(Stream(source, hf.DTYPES[dtype]), folder, dtype, **options)
    return folder


def array_bytes(path: Path) -> dict[tuple[str, int | None], tuple]:
    """Every part of a model in either format, as it reads."""
    source = open_source(path)
    parts = {part: source.read(*part) for part in source.parts()}
    return {part: (array.shape, array.dtype, array.tobytes()) for part, array in parts.items()}
