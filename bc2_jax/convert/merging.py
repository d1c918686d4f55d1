"""Merges adapters into models on disk, and converts adapters between PEFT folders and checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.convert import orbax
from bc2_jax.convert.adapter import find_adapter, load_adapter, require_adapter
from bc2_jax.convert.checkpoints import describe_rest
from bc2_jax.convert.conversion import Options, Summary, to_hf
from bc2_jax.convert.folder import check_free, foreign_in_adapter, foreign_in_checkpoint, written_whole
from bc2_jax.convert.hf_config import HFDType
from bc2_jax.convert.hf_write import FileFormat
from bc2_jax.convert.peft import LoraLayout, save_peft
from bc2_jax.convert.pretrained import find_model
from bc2_jax.convert.source import Source
from bc2_jax.convert.table import Layout, Part, cast, flatten
from bc2_jax.model.lora import SLOTS, Adapter, adapted_weights, equation_of, lost, merge_weight, part_of
from bc2_jax.validation import check_path, join_some

DEFAULTS = Options()


class Merging:
    """A source with an adapter merged into its weights, layer by layer as they are read."""

    def __init__(self, source: Source, adapter: Adapter, dtype: np.dtype) -> None:
        """Weights with an adapter are merged in fp32 and cast once, to `dtype`."""
        self._base, self._adapter, self._dtype = source, adapter, dtype
        self._weights = adapted_weights(adapter.config)
        self._losses: dict[Part, float] = {}
        dtypes = {path: dtype if path in self._weights else own for path, own in source.dtypes.items()}
        self.source = dataclasses.replace(source, dtypes=dtypes, read=self._read)

    def _read(self, path: str, layer: int | None) -> np.ndarray:
        array = self._base.read(path, layer)
        if path not in self._weights:
            return array
        target, name = self._weights[path]
        stacks = part_of(self._adapter.params["layers"][SLOTS[target].block][target], target, name)
        part = {key: np.asarray(stack)[layer] for key, stack in stacks.items()}
        config = self._adapter.config
        exact = merge_weight(equation_of(target), array, part, config.scaling_of(target))
        merged = cast(exact, self._dtype, f"{path}[{layer}]")
        self._losses[path, layer] = float(lost(array, exact, merged))
        return merged

    def notes(self) -> tuple[str, ...]:
        """The largest share of the adapter's change that `dtype` loses."""
        (path, layer), most = max(self._losses.items(), key=lambda item: item[1])
        return (
            f"of the adapter's change, {self._dtype.name} loses at most {most:.3%}, in {path}[{layer}]"
            if most
            else f"{self._dtype.name} loses nothing of the adapter's change",
        )


def merge_lora(
    base: str | Path, adapter: str | Path, folder: str | Path, options: Options = DEFAULTS,
    dtype: HFDType | None = None, layout: Layout = "baichuan2", file_format: FileFormat = "safetensors",
    max_shard_bytes: float = 5e9,
) -> Summary:  # fmt: skip
    """Writes the model in `base` with the adapter merged as a PyTorch folder, one layer in memory at a time.

    `adapter` is as in `load_adapter`, all else as in `to_hf`. The summary's notes say how much `dtype` loses.
    """
    merging: list[Merging] = []
    left: list[str] = []

    def add(source: Source, dtype: np.dtype) -> Source:
        loaded = load_adapter(adapter, source.config)
        left.extend(_left_out(adapter))
        merging.append(Merging(source, loaded, dtype))
        return merging[0].source

    summary = to_hf(base, folder, options, dtype, layout, file_format, max_shard_bytes, add)
    return dataclasses.replace(summary, notes=(*merging[0].notes(), *left, *summary.notes))


def _left_out(adapter: str | Path) -> tuple[str, ...]:
    """A note if the adapter's checkpoint contains more than the adapter."""
    found = find_adapter(adapter)
    if found is None or not found.part:
        return ()
    rest = describe_rest(orbax.open_arrays(found.path), found.part)
    return (f"not carried over from the adapter's checkpoint: {join_some(rest)}",) if rest else ()


def convert_adapter(
    adapter: str | Path, target: str | Path, *, to_peft: bool, base: str | None = None,
    layout: LoraLayout | None = None, overwrite: bool = False,
) -> Adapter:  # fmt: skip
    """Converts an adapter, from a PEFT folder or a LoRA run or checkpoint, to a PEFT folder or a params-only
    checkpoint.

    `base` is its base model, by default the one it records; only its config is read, and only for PEFT's files.
    `layout` as in `save_peft`. Returns the adapter. Raises FileNotFoundError, FileExistsError or ValueError, and then
    leaves nothing behind.
    """
    check_free(Path(target).absolute(), overwrite, foreign_in_adapter if to_peft else foreign_in_checkpoint)
    found = require_adapter(adapter)
    base = base or found.base
    config = found.model or _config_of(found.path, base)
    loaded = load_adapter(adapter, config)
    if to_peft:
        save_peft(target, loaded, config, layout=layout, base=base, overwrite=overwrite)
    else:
        _save_checkpoint(Path(target).absolute(), loaded, config, base, overwrite)
    return loaded


def _config_of(adapter: Path, base: str | None) -> ModelConfig:
    if base is None:
        raise ValueError(f"{adapter} does not record its base model: name the model with --base.")
    try:
        return find_model(base).config
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The base model of {adapter} is not found; name it with --base: {error}") from error


def _save_checkpoint(target: Path, adapter: Adapter, config: ModelConfig, base: str | None, overwrite: bool) -> None:
    check_path("target", target)
    flat = flatten(adapter.params)
    settings: dict[str, Any] = {"model": dataclasses.asdict(config), "lora": dataclasses.asdict(adapter.config)}
    metadata = {"config": settings | {"init_from": base}}
    with written_whole(target, overwrite, foreign_in_checkpoint) as partial:
        arrays = {path: (array.shape, array.dtype) for path, array in flat.items()}
        orbax.write_params(partial, arrays, metadata, lambda path, layer: flat[path][layer])
