"""A reward model as a PyTorch folder: LlamaForSequenceClassification with one label, for models with RoPE."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

from bc2_jax.convert import hf_write, orbax
from bc2_jax.convert.adapter import read_adapter
from bc2_jax.convert.checkpoints import open_params, take_part
from bc2_jax.convert.conversion import Options, Summary
from bc2_jax.convert.folder import check_free, written_whole
from bc2_jax.convert.hf import DTYPES, check_shapes
from bc2_jax.convert.hf_config import HFDType
from bc2_jax.convert.merging import Merging
from bc2_jax.convert.ownership import foreign_in_export
from bc2_jax.convert.pretrained import find_any_model
from bc2_jax.convert.reward import ADAPTER, FoundRewardModel, find_reward_model
from bc2_jax.convert.source import Source, open_source
from bc2_jax.convert.stream import Stream, fingerprint
from bc2_jax.convert.table import Shape, param_shapes
from bc2_jax.model.reward import HEAD, SCORE

DEFAULTS = Options()
_SCORE_PATH, _HEAD_PATH = f"{SCORE}.weight", f"{HEAD}.weight"


def is_reward_model(path: str | Path) -> bool:
    """Whether `path` holds a reward model; raises as `find_model` where there is no model at all."""
    return find_any_model(path).is_reward_model


def export_reward_model(
    path: str | Path, folder: str | Path, options: Options = DEFAULTS, dtype: HFDType = "bfloat16",
    max_shard_bytes: float = 5e9,
) -> Summary:  # fmt: skip
    """Writes the reward model in `path` as safetensors, one layer in memory at a time, its adapter merged.

    Of the options `strict`, `overwrite` and `progress` count. Raises FileNotFoundError, FileExistsError or ValueError,
    in one sentence, also for a model with ALiBi, and then leaves nothing behind.
    """
    target = Path(folder).absolute()
    check_free(target, options.overwrite, foreign_in_export)
    found = find_reward_model(path)
    hf_write.check_layout(found.config, "llama_reward")
    source = _make_source(found, DTYPES[dtype])
    announce, advance = options.progress
    size = sum(int(np.prod(s)) * source.dtypes[name].itemsize for name, s in _shapes(found).items())
    announce(size)
    stream = Stream(source, DTYPES[dtype], strict=options.strict, advance=advance)
    begin = time.perf_counter()
    with written_whole(target, options.overwrite, foreign_in_export) as partial:
        hf_write.write_folder(stream, partial, dtype, "llama_reward", max_shard_bytes=max_shard_bytes)
    written = sum(file.stat().st_size for file in target.iterdir())
    return Summary(
        target, found.config, len(source.dtypes), size, written, time.perf_counter() - begin,
        fingerprint(stream.digests.values()), tuple(stream.not_finite), None,
        ("a reward model: LlamaForSequenceClassification with one label",),
    )  # fmt: skip


def _shapes(found: FoundRewardModel) -> dict[str, Shape]:
    backbone = {name: shape for name, shape in param_shapes(found.config).items() if name != _HEAD_PATH}
    return backbone | {_SCORE_PATH: (found.config.hidden_size,)}


def _make_source(found: FoundRewardModel, dtype: np.dtype) -> Source:
    """The reward model as a source whose score is [1, D]."""
    arrays, shapes = open_params(found.path), _shapes(found)
    if found.lora is None:
        own = arrays
    else:
        own, shapes = {_SCORE_PATH: arrays.get(_SCORE_PATH)}, {_SCORE_PATH: shapes[_SCORE_PATH]}
        own = {name: array for name, array in own.items() if array is not None}
    check_shapes(f"arrays of {found.path}", shapes, {name: array.shape for name, array in own.items()})
    dtypes = {name: array.dtype.numpy_dtype for name, array in own.items()}
    base = None
    if found.lora is not None:
        base = _make_base(found)
        adapter = read_adapter(take_part(arrays, ADAPTER), found.lora, found.config, found.path)
        base = Merging(base, adapter, dtype).source
        dtypes = {name: kind for name, kind in base.dtypes.items() if name not in (_HEAD_PATH, _SCORE_PATH)} | dtypes

    def read(name: str, layer: int | None) -> np.ndarray:
        if name == _SCORE_PATH:
            return orbax.read_part(own[name], None)[None]
        return orbax.read_part(own[name], layer) if base is None else base.read(name, layer)

    return Source(found.path, found.config, dtypes, read, found.tokenizer)


def _make_base(found: FoundRewardModel) -> Source:
    """The model that an adapter is for, a language model or an earlier reward model."""
    if found.base is None:
        raise ValueError(f"{found.path} does not name the model that its run began from.")
    if is_reward_model(found.base):
        base = _make_source(find_reward_model(found.base), np.dtype(np.float32))
    else:
        base = open_source(found.base)
    if param_shapes(base.config) != param_shapes(found.config):
        raise ValueError(f"{found.base}, which the run of {found.path} began from, is of another architecture.")
    return dataclasses.replace(base, config=found.config)
