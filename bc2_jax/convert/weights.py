"""Checks the weights of a PyTorch folder against its config: layout, dtypes and kind of head."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.convert import table
from bc2_jax.convert.hf import FLOAT64, check_tensors, find_layout, split_buffers
from bc2_jax.convert.hf_config import BAICHUAN2_VOCAB, choose, read_json
from bc2_jax.convert.mapped import MappedTensor
from bc2_jax.convert.reading import AS_SAID, Reading
from bc2_jax.validation import join_some

_log = logging.getLogger(__name__)
_HEAD = "lm_head.weight"
_UNIT_TOLERANCE = 0.02
"""Largest deviation of a bf16 row's length from 1."""
_SAMPLED_ROWS = 512
_ROTARY_TOLERANCE = 0.02  # of a table in bf16


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors checked against their config, read as parameters."""

    config: ModelConfig
    layout: table.Layout
    tensors: Mapping[str, MappedTensor]
    dtypes: Mapping[str, np.dtype]  # path -> dtype: that of its tensors, or float32 if theirs differ or are float64

    def read_layer(self, path: str, layer: int | None) -> np.ndarray:
        """One layer of a parameter (all of it if layer is None); a view of the file if possible."""
        return table.read_layer(self.config, self._get, path, layer, self.layout, self.dtypes[path])

    def read_slice(self, path: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of a parameter, as `table.read_slice`."""
        return table.read_slice(self.config, self._get, path, index, self.layout, self.dtypes[path])

    def _get(self, name: str) -> np.ndarray:
        return self.tensors[name].read()


def check_weights(
    folder: Path, config: ModelConfig, tensors: Mapping[str, MappedTensor], reading: Reading = AS_SAID
) -> Weights:
    """The weights of `folder`, given its `hf.read_folder` and its config.

    Logs what is left out, rounded or assumed. Raises ValueError if tensors and config do not fit, or contradict each
    other about positions or the head.
    """
    tensors, buffers = split_buffers(tensors)
    layout = find_layout(tensors)
    check_tensors(config, tensors, layout)
    raw = read_json(folder / "config.json")
    notes = []
    if buffers:
        notes += _check_buffers(config, buffers, choose(raw, reading)["position_embedding"].is_said)
    if raw["model_type"] == "llama":
        _check_head(folder, config, tensors[_HEAD], choose(raw, reading)["normalize_head"].is_said)
    dtypes, said = _choose_dtypes(config, tensors, layout)
    for note in (*notes, *said):
        _log.info("%s: %s", folder, note)
    return Weights(config, layout, tensors, dtypes)


def _check_buffers(config: ModelConfig, buffers: Mapping[str, MappedTensor], is_said: bool) -> list[str]:
    """Raises ValueError if a buffer belongs to another position scheme than config.json implies, unless that is
    explicit.

    Returns notes on the other buffers: PyTorch computes most of them from the config too, whatever the file contains.
    """
    notes = []
    for name, tensor in buffers.items():
        scheme = _scheme_of_buffer(name, tensor)
        if scheme not in (None, config.position_embedding) and not is_said:
            raise ValueError(
                f"position_embedding is not clear: config.json implies {config.position_embedding}, but {name} implies "
                f"{scheme}; decide with --position-embedding rope|alibi of tools/convert.py, or with the key "
                '"position_embedding" in config.json.'
            )
        if name.endswith("inv_freq") and config.position_embedding == "rope":
            expected = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
            found = tensor.read().astype(np.float64)
            if found.shape != expected.shape or not np.allclose(found, expected, _ROTARY_TOLERANCE, 1e-7):
                theta = f"rope_theta = {config.rope_theta}"
                notes.append(f"{name} holds other frequencies than {theta} of config.json gives; the latter are used.")
    names = sorted({re.sub(r"\.\d+\.", ".{}.", name) for name in buffers})
    return [*notes, f"left out, as they are not parameters: {join_some(names)}."]


def _scheme_of_buffer(name: str, tensor: MappedTensor) -> str | None:
    """The position scheme that a buffer belongs to; None if any model may have it."""
    last = name.rpartition(".")[2]
    if ".rotary_emb." in f".{name}" or "inv_freq" in last:
        return "rope"
    if "alibi" in last or last == "slopes":
        return "alibi"
    if last.endswith("mask") and len(tensor.shape) > 1 and 0 not in tensor.shape:
        # The last query's row: all zeros in a causal mask, one value per key if ALiBi is included.
        row = tensor.read()[..., -1, :].astype(np.float32)
        return "alibi" if len(np.unique(row[np.isfinite(row)])) > 2 else None
    return None


def row_lengths(rows: Iterable[np.ndarray]) -> np.ndarray:
    """fp32 lengths of the rows of blocks [n, D]."""
    blocks = (block.astype(np.float32) for block in rows)
    return np.concatenate([np.sqrt(np.sum(block * block, axis=1)) for block in blocks])


def are_unit(lengths: np.ndarray) -> bool:
    """Whether rows of these lengths were normalised; rows of zeros are ignored."""
    return bool(np.all((np.abs(lengths - 1) < _UNIT_TOLERANCE) | (lengths == 0)) and lengths.any())


def _check_head(folder: Path, config: ModelConfig, head: MappedTensor, is_said: bool) -> None:
    """Logs whether a LlamaForCausalLM's head is read as plain or as NormHead; it may have been either."""
    rows = head.read()
    step = -(-len(rows) // _SAMPLED_ROWS)
    lengths = row_lengths([rows[::step]])
    found = f"its rows have lengths {lengths.min():.4f} to {lengths.max():.4f}"
    if config.normalize_head:
        _log.info("%s: the head is read as a NormHead; %s.", folder, found)
    elif are_unit(lengths):
        _log.info(
            "%s: the head is read as a plain one, like LLaMA's; %s: they were normalised, as in an export of Baichuan "
            "2. --normalize-head reads it as a NormHead: the same logits, and training continues with NormHead.",
            folder, found,
        )  # fmt: skip
    elif config.vocab_size == BAICHUAN2_VOCAB and not is_said:
        raise ValueError(
            f"normalize_head is not clear: vocab_size = {BAICHUAN2_VOCAB} is that of Baichuan 2, which has NormHead, "
            f"but LlamaForCausalLM has a plain head, and {found}, so they were not normalised; decide with "
            "--normalize-head or --no-normalize-head."
        )
    else:
        _log.info("%s: the head is read as a plain one, like LLaMA's; %s.", folder, found)


def _choose_dtypes(
    config: ModelConfig, tensors: Mapping[str, MappedTensor], layout: table.Layout
) -> tuple[dict[str, np.dtype], list[str]]:
    """(path -> dtype that holds all of its tensors, notes)."""
    by_path: dict[str, list[np.dtype]] = {}
    for path, layer in table.parts_of(table.param_shapes(config)):
        by_path.setdefault(path, []).append(tensors[table.torch_name(path, layer or 0, layout)].dtype)
    # They are one tensor in the released layout.
    packed = [path for path in by_path if re.search(r"\.[qkv]_proj\.", path)]
    together = [dtype for path in packed for dtype in by_path[path]]
    dtypes, notes = {}, []
    for path, found in by_path.items():
        kinds = set(together if path in packed else found)
        dtypes[path] = next(iter(kinds)) if len(kinds) == 1 and FLOAT64 not in kinds else np.dtype(np.float32)
        if kinds != {dtypes[path]}:
            names = " and ".join(sorted(kind.name for kind in kinds))
            how = "rounded to float32" if FLOAT64 in kinds else "taken as float32, which holds both"
            notes.append(f"{path}, which is {names}, is {how}.")
    return dtypes, notes
