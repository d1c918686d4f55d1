"""Writes a PyTorch folder in one of the layouts, with one or two tensors in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import ModelConfig
from bc2_jax.convert.chat_template import CHAT_TEMPLATE, CHAT_TEMPLATE_NAME
from bc2_jax.convert.checksums import write_sha256sums
from bc2_jax.convert.folder import foreign_in_export, written_whole
from bc2_jax.convert.hf import DTYPES
from bc2_jax.convert.hf_config import HFDType, write_config, write_generation_config, write_json
from bc2_jax.convert.llama_tokenizer import write_llama_tokenizer
from bc2_jax.convert.pickled_write import write_pickled
from bc2_jax.convert.safetensors import write_safetensors
from bc2_jax.convert.source import source_of_params
from bc2_jax.convert.stream import Stream, in_order
from bc2_jax.convert.table import Layout, Shape, build_tensor, torch_shapes, torch_tensors
from bc2_jax.files import file_sha256

FileFormat = Literal["safetensors", "bin"]


def check_layout(config: ModelConfig, layout: Layout) -> None:
    """Raises ValueError if engines that read `layout` cannot run the model."""
    if config.position_embedding == "rope" or not layout.startswith("llama"):
        return
    if layout == "llama_reward":
        raise ValueError(
            f"A reward model with position_embedding = {config.position_embedding!r} has no PyTorch layout that other "
            "programs read: LlamaForSequenceClassification has no ALiBi."
        )
    raise ValueError(
        f"layout = 'llama' is not valid for position_embedding = {config.position_embedding!r}: LlamaForCausalLM "
        "has no ALiBi; legal layouts are baichuan2, baichuan1, and to-gguf for llama.cpp."
    )


def write_folder(
    stream: Stream, folder: Path, dtype: HFDType, layout: Layout = "baichuan2", file_format: FileFormat = "safetensors",
    max_shard_bytes: float = 5e9,
) -> None:  # fmt: skip
    """Creates `folder`: weights, index, config, generation config, chat template, tokenizer and SHA256SUMS.

    The stream must have `dtype`, and a normalised head for engines without NormHead. A tensor larger than
    `max_shard_bytes` gets its own file; infinity writes one file without an index, as released intermediate checkpoints
    have. Raises ValueError as `Stream.read`.
    """
    config = stream.source.config
    folder.mkdir()
    shards = _plan_shards(torch_shapes(config, layout), DTYPES[dtype].itemsize, max_shard_bytes)
    build = functools.partial(build_tensor, config, stream.read)
    stem = "model" if file_format == "safetensors" else "pytorch_model"
    has_index = not math.isinf(max_shard_bytes)
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    pickled: dict[str, Future[str]] = {}
    tensors = in_order(build, torch_tensors(config, layout))
    with ThreadPoolExecutor(1) as pool, contextlib.closing(tensors):
        for i, shard in enumerate(shards, 1):
            name = f"{stem}-{i:05}-of-{len(shards):05}.{file_format}" if has_index else f"{stem}.{file_format}"
            path, contents = folder / name, _take(tensors, len(shard))
            if file_format == "safetensors":
                digests[name] = write_safetensors(path, DTYPES[dtype], shard, contents)
            else:  # its headers are completed after their contents, so it is hashed while the next file is written
                write_pickled(path, DTYPES[dtype], shard, contents)
                pickled[name] = pool.submit(file_sha256, path)
            weight_map |= dict.fromkeys(shard, name)
    digests |= {name: digest.result() for name, digest in pickled.items()}
    total = sum(map(math.prod, torch_shapes(config, layout).values())) * DTYPES[dtype].itemsize
    if has_index:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{file_format}.index.json", index)
    if layout != "baichuan2":
        config = dataclasses.replace(config, normalize_head=False)
    write_config(config, folder, dtype, layout)
    write_generation_config(config, folder, stream.source.generation)
    chat_template = stream.source.chat_template or CHAT_TEMPLATE
    (folder / CHAT_TEMPLATE_NAME).write_text(chat_template, encoding="utf-8", newline="")
    if stream.source.tokenizer is not None:
        shutil.copyfile(stream.source.tokenizer, folder / TOKENIZER_NAME)
        if layout.startswith("llama"):
            write_llama_tokenizer(stream.source.tokenizer, config, folder, chat_template)
    others = {file.name: file_sha256(file) for file in folder.iterdir() if file.name not in digests}
    write_sha256sums(folder, others | digests)


def _take(stream: Iterator[tuple[str, np.ndarray]], count: int) -> Iterator[tuple[str, np.ndarray]]:
    # zip reads the range first, so it takes no extra item from the stream.
    return (item for _, item in zip(range(count), stream, strict=False))


def _plan_shards(shapes: Mapping[str, Shape], itemsize: int, max_bytes: float) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def save_folder(
    params: Mapping[str, Any],
    config: ModelConfig,
    folder: str | Path,
    dtype: HFDType = "bfloat16",
    max_shard_bytes: float = 5e9,
    tokenizer_path: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `params` in memory in the released layout, as safetensors.

    `params` are numpy or jax arrays, the latter sharded in any way over devices of this process; one layer at a time is
    copied to the host. The folder appears when it is complete (`folder.written_whole`). Raises FileExistsError if it
    exists and `overwrite` is false or it contains other files; ValueError if params do not fit the config or a finite
    value overflows in `dtype`.
    """
    source = source_of_params(params, config, None if tokenizer_path is None else Path(tokenizer_path))
    with written_whole(Path(folder), overwrite, foreign_in_export) as partial:
        write_folder(Stream(source, DTYPES[dtype]), partial, dtype, max_shard_bytes=max_shard_bytes)
