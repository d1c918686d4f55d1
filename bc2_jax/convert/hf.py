"""A folder as the releases are laid out: config.json, generation_config.json and sharded weights.

Reading refuses what it does not understand before any array is built; writing goes to a sibling folder that is renamed
when it is complete, so a folder with the final name is always whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.convert.mapped import MappedTensor
from bc2_jax.convert.pickled import read_pickled
from bc2_jax.convert.safetensors import read_safetensors, write_safetensors
from bc2_jax.convert.table import Shape, flatten, from_torch, param_shapes, to_torch, torch_shapes

HFDType = Literal["bfloat16", "float16", "float32"]

_log = logging.getLogger(__name__)
_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_BAICHUAN1_VOCAB = 64_000


# ---------------------------------------------------------------------------------------------------- config.json


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a folder's config.json.

    Two things that a released config.json does not say are inferred, unless our own keys `position_embedding` and
    `normalize_head` say them, and the log tells why: `max_position_embeddings` or hidden_size 4096 means RoPE,
    otherwise ALiBi; the spelling `BaiChuanForCausalLM` or 64,000 tokens means Baichuan 1, which has no NormHead.
    Raises ValueError if a key is missing or has a value that this library does not implement.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    _refuse_unsupported(path, raw)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ModelConfig):
        if field.name not in raw:
            continue
        value, kind = raw[field.name], {"int": int, "float": float, "bool": bool}.get(str(field.type), str)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{path}: {field.name} = {value!r} is not valid: expected {kind.__name__}.")
        values[field.name] = value
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if absent := [name for name in sizes if name not in values]:
        raise ValueError(f"{path} has no {', '.join(absent)}.")
    values.setdefault("z_loss_weight", 0.0)  # the released class's default; ours is the paper's
    if "model_max_length" not in values and type(raw.get("max_position_embeddings")) is int:
        values["model_max_length"] = raw["max_position_embeddings"]  # Baichuan-7B (1) has only this one
    for name, (value, why) in _infer(raw).items():
        if name not in values:
            values[name] = value
            _log.info("%s: %s = %s, because %s.", path, name, value, why)
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _infer(raw: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Field -> (value, reason) for what a released config.json does not say."""
    if raw.get("max_position_embeddings") is not None:
        position = ("rope", f"max_position_embeddings = {raw['max_position_embeddings']} is present")
    elif raw["hidden_size"] == 4096:
        position = ("rope", "hidden_size = 4096 is the 7B model's")
    else:
        position = ("alibi", f"max_position_embeddings is absent and hidden_size = {raw['hidden_size']} is not 4096")
    if "BaiChuanForCausalLM" in (raw.get("architectures") or ()):
        head = (False, "BaiChuanForCausalLM, so spelt, is Baichuan 1")
    elif raw["vocab_size"] == _BAICHUAN1_VOCAB:
        head = (False, f"vocab_size = {_BAICHUAN1_VOCAB} is Baichuan 1's")
    else:
        head = (True, "Baichuan 2 has NormHead")
    return {"position_embedding": position, "normalize_head": head}


def _refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    if raw.get("model_type") != "baichuan":
        raise ValueError(f"{path}: model_type = {raw.get('model_type')!r} is not supported: only baichuan is.")
    heads = raw.get("num_attention_heads")
    for key, supported in {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_key_value_heads": heads,
        "rope_scaling": None,
        "quantization_config": None,
    }.items():
        if raw.get(key, supported) not in (supported, None):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported: only {json.dumps(supported)} is.")


def write_config(config: ModelConfig, folder: str | Path, dtype: HFDType = "bfloat16") -> None:
    """Writes config.json: the keys of a release and our own, so `read_config` gives back exactly `config`."""
    # Baichuan 1 with RoPE is the one that engines know by its other spelling.
    baichuan1_7b = not config.normalize_head and config.position_embedding == "rope"
    raw = {
        "architectures": ["BaiChuanForCausalLM" if baichuan1_7b else "BaichuanForCausalLM"],
        "model_type": "baichuan",
        "tokenizer_class": "BaichuanTokenizer",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        **dataclasses.asdict(config),
    }
    if config.position_embedding == "rope":  # its presence is how other engines tell RoPE from ALiBi
        raw["max_position_embeddings"] = config.model_max_length
    _write_json(Path(folder) / "config.json", raw)


def _write_generation_config(config: ModelConfig, folder: Path) -> None:
    """The released defaults of chat."""
    raw = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "user_token_id": 195,
        "assistant_token_id": 196,
        "max_new_tokens": 2048,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "repetition_penalty": 1.05,
        "do_sample": True,
    }
    _write_json(folder / "generation_config.json", raw)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return raw


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- reading


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
        raise ValueError(f"{folder} is incomplete: {_list(missing)} not there.")
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
        raise ValueError(f"{folder}: {_list(problems)}.")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _find_files(folder: Path, stem: str, suffix: str) -> tuple[list[str], dict[str, str] | None] | None:
    """The weight files of one format and, where there is one, the index tensor name -> file name."""
    single, index_path = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
    if single.is_file() and index_path.is_file():
        raise ValueError(f"{folder} has both {single.name} and {index_path.name}: remove the one that is out of date.")
    if single.is_file():
        return [single.name], None
    if index_path.is_file():
        index = _read_json(index_path).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{index_path} has no weight_map from tensor names to files.")
        # Only the name is judged: files of the Hugging Face cache are symbolic links out of their folder.
        pattern = re.compile(rf"[\w.-]+\.{suffix}", re.ASCII)
        if bad := sorted({file for file in index.values() if not pattern.fullmatch(file)}):
            raise ValueError(
                f"{index_path} names {_list(map(repr, bad))}: expected *.{suffix} files of its own folder."
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
        raise ValueError(f"{folder} has no index and shards of different sets: {_list(surplus)} beside {expected[0]}.")
    return expected, None


def check_tensors(config: ModelConfig, tensors: Mapping[str, MappedTensor]) -> None:
    """Raises ValueError, naming them, for missing, unexpected and misshapen tensors and dtypes that are not ours."""
    shapes = torch_shapes(config)
    problems = [f"{name} is missing" for name in shapes if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in shapes]
    dtypes: dict[str, np.dtype] = {}
    for name, shape in shapes.items():
        if (tensor := tensors.get(name)) is None:
            continue
        if tensor.shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, expected {shape}")
        if tensor.dtype not in _DTYPES.values():
            problems.append(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
        # We stack the layers, so one kind of tensor has one dtype.
        first = dtypes.setdefault(re.sub(r"\.\d+\.", ".", name), tensor.dtype)
        if tensor.dtype != first:
            problems.append(f"{name} has dtype {tensor.dtype}, in the layers before it is {first}")
    if problems:
        raise ValueError(f"The tensors do not fit the config: {_list(problems)}.")


def load_params(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """Our nested dict of numpy arrays, in the dtype of the files.

    To load onto a mesh instead, pass `open_folder` and `check_tensors` through `table.read_slice`.
    """
    tensors = open_folder(folder)
    check_tensors(config, tensors)
    return from_torch(config, lambda name: tensors[name].read())


def _list(items: Any, limit: int = 20) -> str:
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "; ".join(items[:limit] + more)


# -------------------------------------------------------------------------------------------------------- writing


def save_folder(
    params: Mapping[str, Any],
    config: ModelConfig,
    folder: str | Path,
    dtype: HFDType = "bfloat16",
    max_shard_bytes: float = 5e9,
    tokenizer_path: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `params` in the released layout, as safetensors, with one PyTorch tensor in memory at a time.

    `params` holds numpy or jax arrays, the latter sharded in any way over devices of this process; one layer at a time
    is copied to the host. A tensor larger than `max_shard_bytes` gets a file of its own. `tokenizer_path` is copied as
    tokenizer.model. Until it is complete the folder is called .NAME.partial; one left by an interrupted run is
    replaced.

    Raises FileExistsError if the folder exists and `overwrite` is false, or is no checkpoint; ValueError if params do
    not fit the config or a finite value overflows in `dtype`.
    """
    folder = Path(folder).absolute()
    if folder.exists() or folder.is_symlink():
        if not overwrite:
            raise FileExistsError(f"{folder} exists; pass overwrite to replace it.")
        if folder.is_symlink() or not (folder / "config.json").is_file():
            raise FileExistsError(f"{folder} exists and is not a folder with a config.json; not replaced.")
    flat = flatten(params)
    _check_params(config, flat)
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        write_config(config, partial, dtype)
        _write_generation_config(config, partial)
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, partial / "tokenizer.model")
        _write_weights(config, flat, partial, dtype, max_shard_bytes)
        _replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_params(config: ModelConfig, flat: Mapping[str, Any]) -> None:
    shapes = param_shapes(config)
    problems = [f"{path} is missing" for path in shapes if path not in flat]
    problems += [f"{path} is unexpected" for path in flat if path not in shapes]
    problems += [
        f"{path} has shape {tuple(flat[path].shape)}, expected {shape}"
        for path, shape in shapes.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    if problems:
        raise ValueError(f"The parameters do not fit the config: {_list(problems)}.")


def _write_weights(
    config: ModelConfig, flat: Mapping[str, Any], folder: Path, dtype: HFDType, max_shard_bytes: float
) -> None:
    def get_array(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(flat[path] if layer is None else flat[path][layer])

    shards = _plan_shards(torch_shapes(config), _DTYPES[dtype].itemsize, max_shard_bytes)
    stream = ((name, _cast(name, tensor, dtype)) for name, tensor in to_torch(config, get_array))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, _DTYPES[dtype], shard, _take(stream, len(shard)))
        weight_map |= dict.fromkeys(shard, file)
    total = config.num_parameters() * _DTYPES[dtype].itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _take(stream: Iterator[tuple[str, np.ndarray]], count: int) -> Iterator[tuple[str, np.ndarray]]:
    # zip asks the range first, so nothing is taken from the stream and lost.
    return (item for _, item in zip(range(count), stream, strict=False))


def _plan_shards(shapes: Mapping[str, Shape], itemsize: int, max_bytes: float) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def _cast(name: str, tensor: np.ndarray, dtype: HFDType) -> np.ndarray:
    if tensor.dtype == _DTYPES[dtype]:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(_DTYPES[dtype])
    overflow = np.isinf(cast)
    if overflow.any() and np.isfinite(tensor[overflow]).any():
        largest = np.abs(tensor[np.isfinite(tensor)]).max()
        raise ValueError(f"{name} overflows in {dtype}: its largest value is {float(largest):.6g}; use bfloat16.")
    return cast


def _replace(partial: Path, folder: Path) -> None:
    """Gives a complete folder its name; an older one of that name is deleted only after that."""
    _sync(partial)
    old = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    """Makes the entries of a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
