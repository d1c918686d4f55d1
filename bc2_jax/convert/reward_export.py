"""Exports a reward model as a PyTorch folder: LlamaForSequenceClassification with one label, for RoPE models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from bc2_jax.convert import hf_write, orbax
from bc2_jax.convert.adapter import read_adapter
from bc2_jax.convert.checkpoints import open_params, take_part
from bc2_jax.convert.conversion import Options, Summary, open_stream, run_conversion
from bc2_jax.convert.folder import check_free, foreign_in_export
from bc2_jax.convert.hf import DTYPES, check_shapes
from bc2_jax.convert.hf_config import HFDType
from bc2_jax.convert.merging import Merging
from bc2_jax.convert.pretrained import find_any_model
from bc2_jax.convert.reward import ADAPTER, SCORE_PATH, FoundRewardModel, backbone_shapes, find_reward_model
from bc2_jax.convert.source import Source, open_source
from bc2_jax.convert.table import param_shapes

DEFAULTS = Options()


def is_reward_model(path: str | Path) -> bool:
    """Whether `path` is a reward model; raises as `find_model` if there is no model."""
    return find_any_model(path).is_reward_model


def export_reward_model(
    path: str | Path, folder: str | Path, options: Options = DEFAULTS, dtype: HFDType = "bfloat16",
    max_shard_bytes: float = 5e9,
) -> Summary:  # fmt: skip
    """Writes the reward model in `path` as safetensors, one layer in memory at a time, with its adapter merged.

    Uses the options `strict`, `overwrite` and `progress`. Raises FileNotFoundError, FileExistsError or ValueError, also
    for a model with ALiBi, and then leaves nothing behind.
    """
    target = Path(folder).absolute()
    check_free(target, options.overwrite, foreign_in_export)
    found = find_reward_model(path)
    hf_write.check_layout(found.config, "llama_reward")
    stream = open_stream(_make_source(found, DTYPES[dtype]), options, DTYPES[dtype])

    def write(partial: Path) -> None:
        hf_write.write_folder(stream, partial, dtype, "llama_reward", max_shard_bytes=max_shard_bytes)

    notes = ("a reward model: LlamaForSequenceClassification with one label",)
    return run_conversion(stream, target, foreign_in_export, options, write, notes)


def _make_source(found: FoundRewardModel, dtype: np.dtype) -> Source:
    """The reward model as a source whose score is [1, D]."""
    arrays, score = open_params(found.path), {SCORE_PATH: (found.config.hidden_size,)}
    backbone = backbone_shapes(found.config)
    own = arrays if found.lora is None else {name: arrays[name] for name in score if name in arrays}
    check_shapes(
        f"arrays of {found.path}", backbone | score if found.lora is None else score,
        {name: array.shape for name, array in own.items()},
    )  # fmt: skip
    dtypes = {name: array.dtype.numpy_dtype for name, array in own.items()}
    base = None
    if found.lora is not None:
        adapter = read_adapter(take_part(arrays, ADAPTER), found.lora, found.config, found.path)
        base = Merging(_make_base(found), adapter, dtype).source
        dtypes |= {name: base.dtypes[name] for name in backbone}

    def read(name: str, layer: int | None) -> np.ndarray:
        if name == SCORE_PATH:
            return orbax.read_part(own[name], None)[None]
        return orbax.read_part(own[name], layer) if base is None else base.read(name, layer)

    return Source(found.path, found.config, dtypes, read, found.tokenizer, own_shapes=backbone | score)


def _make_base(found: FoundRewardModel) -> Source:
    """The model that an adapter is for, a language model or an earlier reward model."""
    if found.base is None:
        raise ValueError(f"{found.path} does not name the model that its run started from.")
    if is_reward_model(found.base):
        base = _make_source(find_reward_model(found.base), np.dtype(np.float32))
    else:
        base = open_source(found.base)
    if param_shapes(base.config) != param_shapes(found.config):
        raise ValueError(f"{found.base}, from which the run of {found.path} started, has another architecture.")
    return dataclasses.replace(base, config=found.config)
