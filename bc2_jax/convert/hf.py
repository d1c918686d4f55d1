"""Weight files of a PyTorch folder: finding, opening and checking tensors by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.convert.hf_config import read_json
from bc2_jax.convert.mapped import MappedTensor
from bc2_jax.convert.pickled import read_pickled
from bc2_jax.convert.safetensors import read_safetensors
from bc2_jax.convert.table import Layout, Shape, torch_shapes
from bc2_jax.validation import join_some

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
FLOAT64 = np.dtype(np.float64)
# Buffers that PyTorch models compute and some save: RoPE tables, ALiBi masks.
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\..+|(original_)?inv_freq|_?(cos|sin)(_cached|_cache)?|freqs_cis|rope_cache|future_mask|masked_bias"
    r"|alibi(_mask|_slopes)?|slopes|(causal|attn|attention)_mask|position_ids)$"
)
_EMBEDDING = "model.embed_tokens.weight"
# Prefix of tensor names -> the wrapper that adds it.
_WRAPPERS = {
    "module.": "DataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "base_model.": "PEFT",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning",
}
_ADAPTER = re.compile(r"(^|\.)(lora_|base_layer\.|modules_to_save\.|hada_|oft_|vera_|ia3_|prompt_encoder|prompt_embed)")


def open_folder(folder: str | Path, strip_prefix: str = "") -> dict[str, MappedTensor]:
    """`read_folder` without buffers."""
    return split_buffers(read_folder(folder, strip_prefix))[0]


def split_buffers(tensors: Mapping[str, MappedTensor]) -> tuple[dict[str, MappedTensor], dict[str, MappedTensor]]:
    """(parameters, buffers); buffers are tables that PyTorch models compute themselves, and counters."""
    buffers = {
        name: tensor
        for name, tensor in tensors.items()
        if _BUFFER.search(name) or (tensor.shape == () and tensor.dtype.kind in "iub")
    }
    return {name: tensor for name, tensor in tensors.items() if name not in buffers}, buffers


def read_folder(folder: str | Path, strip_prefix: str = "") -> dict[str, MappedTensor]:
    """PyTorch name -> tensor, from all weight files of a folder; reads only their headers.

    Uses safetensors if there are any, else pytorch_model*.bin (never executed), as one file or as shards, with or
    without an index. `strip_prefix` is removed from the names. Raises ValueError if a shard is missing, the index names
    a file outside the folder, the index and the files disagree, or a tensor is in two files.
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
        raise ValueError(f"{folder} is incomplete: it lacks {join_some(missing)}.")
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
    try:
        return _strip(tensors, strip_prefix) if strip_prefix else tensors
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _strip(tensors: Mapping[str, MappedTensor], prefix: str) -> dict[str, MappedTensor]:
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    # Wrappers of submodules start with "_" and may be in the middle of a name.
    place = r"(^|(?<=\.))" if prefix.startswith("_") else "^"
    stripped: dict[str, MappedTensor] = {}
    for name, tensor in tensors.items():
        short = re.sub(place + re.escape(prefix), "", name)
        if short in stripped:
            raise ValueError(f"without {prefix!r} two tensors are called {short}.")
        stripped[short] = tensor
    if stripped.keys() == tensors.keys():
        first = next(iter(tensors), "nothing")
        raise ValueError(
            f"--strip-prefix {prefix} is not valid: no tensor's name begins with it; one is called {first}."
        )
    return stripped


def _find_files(folder: Path, stem: str, suffix: str) -> tuple[list[str], dict[str, str] | None] | None:
    """The weight files of one format, and the index tensor name -> file name if there is one."""
    single, index_path = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
    if single.is_file() and index_path.is_file():
        raise ValueError(f"{folder} has both {single.name} and {index_path.name}: remove the one that is out of date.")
    if single.is_file():
        return [single.name], None
    if index_path.is_file():
        index = read_json(index_path).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{index_path} has no weight_map from tensor names to files.")
        # Checks names only: files of the Hugging Face cache are symbolic links out of their folder.
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


def find_layout(names: Iterable[str]) -> Layout:
    """The layout of tensors with these names: attention fused in W_pack, or in three tensors as in LLaMA."""
    return "llama" if any(name.endswith(".self_attn.q_proj.weight") for name in names) else "baichuan2"


def check_tensors(config: ModelConfig, tensors: Mapping[str, MappedTensor], layout: Layout = "baichuan2") -> None:
    """Raises ValueError that names missing, unexpected and misshapen tensors and unsupported dtypes."""
    expected = torch_shapes(config, layout)
    if tensors.keys() != expected.keys():
        _explain_names(tensors)
    check_shapes("tensors", expected, {name: tensor.shape for name, tensor in tensors.items()})
    readable = {**DTYPES, "float64": FLOAT64}
    problems = [
        f"{name} has dtype {tensor.dtype}, expected one of {', '.join(readable)}"
        for name, tensor in tensors.items()
        if tensor.dtype not in readable.values()
    ]
    if problems:
        raise ValueError(f"The tensors do not fit the config: {join_some(problems)}.")


def _explain_names(names: Iterable[str]) -> None:
    """Raises ValueError if the names are those of an unmerged adapter or a wrapped model."""
    if adapters := [name for name in names if _ADAPTER.search(name)]:
        raise ValueError(
            f"{adapters[0]} belongs to an adapter (LoRA or similar) that is not merged: merge it into the weights "
            "first, with PEFT's merge_and_unload."
        )
    prefix = next((name.removesuffix(_EMBEDDING) for name in names if name.endswith(f".{_EMBEDDING}")), "")
    if not prefix:  # a wrapper of a submodule
        prefix = next((w for w in _WRAPPERS for name in names if w.startswith("_") and f".{w}" in f".{name}"), "")
    if prefix:
        origins = [origin for wrapper, origin in _WRAPPERS.items() if f".{wrapper}" in f".{prefix}"]
        by = f", added by {' and '.join(origins)}" if origins else ""
        raise ValueError(
            f"The tensors' names start with {prefix!r}{by}: pass --strip-prefix {prefix} to "
            f"tools/convert.py (in Python: Reading(strip_prefix={prefix!r}))."
        )


def compare_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> tuple[list[str], list[str], list[str]]:
    """(names that are missing, names that are unexpected, sentences on those with another shape)."""
    misshapen = [
        f"{name} has shape {tuple(found[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    return [n for n in expected if n not in found], [n for n in found if n not in expected], misshapen


def check_shapes(what: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raises ValueError that names missing, unexpected and misshapen entries."""
    missing, unexpected, misshapen = compare_shapes(expected, found)
    problems = [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    if problems + misshapen:
        raise ValueError(f"The {what} do not fit the config: {join_some(problems + misshapen)}.")
