"""A model on disk in either format, read one layer at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax import manifest
from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf, orbax
from bc2_jax.convert.chat_template import CHAT_TEMPLATE_NAME, read_chat_template
from bc2_jax.convert.checkpoints import describe_rest, explain_quantized, take_part
from bc2_jax.convert.checksums import SUMS_NAME
from bc2_jax.convert.folder import foreign_in_checkpoint
from bc2_jax.convert.hf_config import read_generation_config
from bc2_jax.convert.pretrained import FoundModel, find_model
from bc2_jax.convert.reading import AS_SAID, Reading
from bc2_jax.convert.table import Part, Reader, Shape, flatten, param_shapes, parts_of
from bc2_jax.convert.weights import check_weights


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in `path`, a PyTorch folder or a checkpoint, that is read one layer at a time."""

    path: Path
    config: ModelConfig
    dtypes: Mapping[str, np.dtype]
    """Path -> dtype on disk; float32 if the tensors of a folder differ in dtype or are float64."""
    read: Reader  # returns an array in that dtype, a view of a mapped file or a copy
    tokenizer: Path | None
    generation: Mapping[str, Any] | None = None
    chat_template: str | None = None
    files: tuple[Path, ...] = ()  # weight files of a PyTorch folder, or of a training checkpoint with a manifest
    manifested: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each of `files` in that manifest."""
    is_training: bool = False  # whether it is a training checkpoint, whose parameters are the float32 masters
    unread: tuple[str, ...] = ()  # names of other files there, which a conversion leaves out
    own_shapes: Mapping[str, Shape] | None = None
    """Path -> shape; None for a language model, which has those of its config."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Path -> shape of each array."""
        return param_shapes(self.config) if self.own_shapes is None else self.own_shapes

    @property
    def num_bytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(math.prod(shape) * self.dtypes[path].itemsize for path, shape in self.shapes.items())

    def parts(self) -> list[Part]:
        return parts_of(self.shapes)


def open_source(path: str | Path, reading: Reading = AS_SAID) -> Source:
    """Opens the model in `path`; reads only metadata.

    Raises FileNotFoundError or ValueError if it is not complete and consistent.
    """
    found = find_model(path, reading)
    return make_source(found, open_contents(found, reading), reading)


def open_contents(found: FoundModel, reading: Reading = AS_SAID) -> dict[str, Any]:
    """Name -> tensor of a PyTorch folder or array of a checkpoint, unchecked; each has a shape and a dtype.

    Raises ValueError for a quantized model.
    """
    if found.format == "pytorch":
        return hf.read_folder(found.path, reading.strip_prefix)
    if found.is_quantized:
        raise ValueError(explain_quantized(found.path))
    return take_part(orbax.open_arrays(found.path), found.part)


def make_source(found: FoundModel, contents: dict[str, Any], reading: Reading = AS_SAID) -> Source:
    """The source of a model's `open_contents`, checked as in `open_source`."""
    folder, config = found.path, found.config
    if found.format == "orbax":
        return _make_orbax(found, contents)
    weights = check_weights(folder, config, contents, reading)
    files = tuple(sorted({tensor.file for tensor in contents.values()}))
    return Source(
        folder, config, weights.dtypes, weights.read_layer, found.tokenizer, read_generation_config(folder),
        read_chat_template(folder), files, unread=_unread(folder, files),
    )  # fmt: skip


def _make_orbax(found: FoundModel, arrays: dict[str, Any]) -> Source:
    folder, config = found.path, found.config
    hf.check_shapes(f"arrays of {folder}", param_shapes(config), {name: array.shape for name, array in arrays.items()})
    hashes = {}
    if (folder / manifest.MANIFEST_NAME).is_file():
        states = sorted(manifest.read_manifest(folder).items())
        hashes = {folder / name: state.sha256 for name, state in states if name.startswith("params/")}
    template = found.metadata.get("chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{folder}: chat_template = {template!r} of its metadata is not text.")
    training = {"opt_state/", manifest.MANIFEST_NAME}
    return Source(
        folder, config, {name: array.dtype.numpy_dtype for name, array in arrays.items()},
        lambda name, layer: orbax.read_part(arrays[name], layer), found.tokenizer, found.metadata.get("generation"),
        template,
        tuple(hashes), hashes, (folder / "opt_state").is_dir(),
        (*describe_rest(orbax.open_arrays(folder) if found.part else {}, found.part),
         *(name for name in foreign_in_checkpoint(folder) if name not in training)),
    )  # fmt: skip


def _unread(folder: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """Files beside the weight files of a PyTorch folder that are not read; hidden files are skipped."""
    read = {file.name for file in files} | {TOKENIZER_NAME, SUMS_NAME, "config.json", "generation_config.json"}
    read.add(CHAT_TEMPLATE_NAME)
    # Indexes of the formats that are read; another format's index is not.
    read |= {f"{stem}{suffix}.index.json" for stem, suffix in {(f.name.split("-")[0], f.suffix) for f in files}}
    names = (path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return tuple(sorted(name for name in names if name not in read))


def source_of_params(params: Mapping[str, Any], config: ModelConfig, tokenizer: Path | None = None) -> Source:
    """Parameters in memory, sharded over devices of this process in any way, as a source; a layer is copied when it is
    read.

    Raises ValueError if they do not fit the config.
    """
    flat = flatten(params)
    hf.check_shapes("parameters", param_shapes(config), {name: array.shape for name, array in flat.items()})

    def read(name: str, layer: int | None) -> np.ndarray:
        return np.asarray(flat[name] if layer is None else flat[name][layer])

    return Source(Path("memory"), config, {name: np.dtype(a.dtype) for name, a in flat.items()}, read, tokenizer)
