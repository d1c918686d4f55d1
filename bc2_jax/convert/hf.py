"""The weights of a PyTorch folder, laid out as the releases; what is not understood is refused unread."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.convert.hf_config import read_json
from bc2_jax.convert.mapped import MappedTensor
from bc2_jax.convert.pickled import read_pickled
from bc2_jax.convert.safetensors import read_safetensors
from bc2_jax.convert.table import Layout, Shape, torch_shapes

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def open_folder(folder: str | Path) -> dict[str, MappedTensor]:
    """PyTorch name -> tensor, of all weight files of a folder; nothing read but their headers.

    Takes safetensors if there are any, else pytorch_model*.bin (never executed), each as one file or as shards, with or
    without their index. `rotary_emb.inv_freq` buffers (Baichuan 1) are skipped. Raises ValueError if a shard is
    missing, the index names a file outside the folder, the index and the files disagree, or a tensor is in two files.
    """
    folder = Path(folder)
    read = read_safetensors
    found = _find_files(folder, "model", "safetensors")
    if found is None:
        read = read_pickled
        found = _find_files(folder, "pytorch_model", "bin")
    if found is None:
        raise FileNotFoundError(f"{folder} has neither model*.safetensors nor pytorch_model*.bin.")
    files, index = found
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder} is incomplete: {join_some(missing)} not there.")
    tensors: dict[str, MappedTensor] = {}
    problems = []
    for file in files:
        for name, tensor in read(folder / file).items():
            if name in tensors:
                problems.append(f"{name} is in {tensors[name].file.name} and in {file}")
            elif index is not None and name not in index:
                problems.append(f"{name} is in {file} but not in the index")
            elif index is not None and index[name] != file:
                problems.append(f"{name} is in {file}, the index says {index[name]}")
            tensors[name] = tensor
    problems += [
        f"{name} is in the index but not in {file}" for name, file in (index or {}).items() if name not in tensors
    ]
    if problems:
        raise ValueError(f"{folder}: {join_some(problems)}.")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _find_files(folder: Path, stem: str, suffix: str) -> tuple[list[str], dict[str, str] | None] | None:
    """The weight files of one format and, where there is one, the index tensor name -> file name."""
    single, index_path = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
    if single.is_file() and index_path.is_file():
        raise ValueError(f"{folder} has both {single.name} and {index_path.name}: remove the one that is out of date.")
    if single.is_file():
        return [single.name], None
    if index_path.is_file():
        index = read_json(index_path).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{index_path} has no weight_map from tensor names to files.")
        # Only the name is judged: files of the Hugging Face cache are symbolic links out of their folder.
        pattern = re.compile(rf"[\w.-]+\.{suffix}", re.ASCII)
        if bad := sorted({file for file in index.values() if not pattern.fullmatch(file)}):
            raise ValueError(
                f"{index_path} names {join_some(map(repr, bad))}: expected *.{suffix} files of its own folder."
            )
        return sorted(set(index.values())), index
    shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
    if not shards:
        return None
    total = shards[0].stem.rpartition("-")[2]
    if not re.fullmatch(r"[0-9]{5}", total):
        raise ValueError(f"{shards[0]} is not named like a shard, {stem}-00001-of-00002.{suffix}.")
    expected = [f"{stem}-{i:05}-of-{total}.{suffix}" for i in range(1, int(total) + 1)]
    if surplus := [shard.name for shard in shards if shard.name not in expected]:
        raise ValueError(
            f"{folder} has no index and shards of different sets: {join_some(surplus)} beside {expected[0]}."
        )
    return expected, None


def check_tensors(config: ModelConfig, tensors: Mapping[str, MappedTensor], layout: Layout = "baichuan2") -> None:
    """Raises ValueError, naming them, for missing, unexpected and misshapen tensors and dtypes that are not ours."""
    check_shapes("tensors", torch_shapes(config, layout), {name: tensor.shape for name, tensor in tensors.items()})
    problems = []
    first: dict[str, np.dtype] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            problems.append(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(DTYPES)}")
        # We stack the layers, so one kind of tensor has one dtype.
        expected = first.setdefault(re.sub(r"\.\d+\.", ".", name), tensor.dtype)
        if tensor.dtype != expected:
            problems.append(f"{name} has dtype {tensor.dtype}, in the layers before it is {expected}")
    if problems:
        raise ValueError(f"The tensors do not fit the config: {join_some(problems)}.")


def check_shapes(what: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raises ValueError, naming them, for missing, unexpected and misshapen entries."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        raise ValueError(f"The {what} do not fit the config: {join_some(problems)}.")


def join_some(items: Any, limit: int = 20) -> str:
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "; ".join(items[:limit] + more)
