"""A model on disk, read one layer at a time, whichever format it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
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
from bc2_jax.convert.hf_config import read_generation_config
from bc2_jax.convert.ownership import foreign_in_checkpoint
from bc2_jax.convert.pretrained import FoundModel, find_model
from bc2_jax.convert.reading import AS_SAID, Reading
from bc2_jax.convert.table import Reader, flatten, layers_of, param_shapes
from bc2_jax.convert.weights import check_weights


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in `path`, a PyTorch folder or a checkpoint of ours."""

    path: Path
    config: ModelConfig
    dtypes: Mapping[str, np.dtype]
    """Our path -> dtype on disk; float32 where that of the tensors of a folder is not one, or is float64."""
    read: Reader
    """(our path, layer) -> array in that dtype; a view of a file that is mapped while it lives, or a copy."""
    tokenizer: Path | None
    """tokenizer.model beside it."""
    generation: Mapping[str, Any] | None = None
    """generation_config.json, as it came with a release."""
    chat_template: str | None = None
    """The Jinja template that came with it."""
    files: tuple[Path, ...] = ()
    """The weight files of a PyTorch folder, or those of a training checkpoint that has a manifest."""
    manifested: Mapping[Path, str] = dataclasses.field(default_factory=dict)
    """What that manifest says the SHA-256 of each of `files` is."""
    is_training: bool = False
    """Whether it is a training checkpoint, whose parameters are the float32 masters."""
    unread: tuple[str, ...] = ()
    """Names of what else lies there, which a conversion does not carry over."""

    def parts(self) -> Iterator[tuple[str, int | None]]:
        """Every (our path, layer) there is, sorted by path."""
        for path in sorted(param_shapes(self.config)):
            yield from ((path, layer) for layer in layers_of(self.config, path))


def open_source(path: str | Path, reading: Reading = AS_SAID) -> Source:
    """The model in `path`; nothing read but metadata.

    Raises FileNotFoundError or ValueError, in one sentence, if it is not whole and consistent.
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
    """The source that a model's `open_contents` are, checked as in `open_source`."""
    if found.format == "pytorch":
        return _make_torch(found, contents, reading)
    return _make_orbax(found, contents)


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


def _make_torch(found: FoundModel, tensors: dict[str, Any], reading: Reading) -> Source:
    folder, config = found.path, found.config
    weights = check_weights(folder, config, tensors, reading)
    generation = read_generation_config(folder)
    files = tuple(sorted({tensor.file for tensor in tensors.values()}))
    return Source(
        folder, config, weights.dtypes, weights.read_layer, found.tokenizer, generation,
        read_chat_template(folder), files,
        unread=_unread(folder, files),
    )  # fmt: skip


def _unread(folder: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """What lies beside the weight files of a PyTorch folder and is not read; hidden files are not mentioned."""
    read = {file.name for file in files} | {TOKENIZER_NAME, SUMS_NAME, "config.json", "generation_config.json"}
    read.add(CHAT_TEMPLATE_NAME)
    # An index belongs to the weight files that are read, or to a format that is not.
    read |= {f"{stem}{suffix}.index.json" for stem, suffix in {(f.name.split("-")[0], f.suffix) for f in files}}
    names = (path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return tuple(sorted(name for name in names if name not in read))


def source_of_params(params: Mapping[str, Any], config: ModelConfig, tokenizer: Path | None = None) -> Source:
    """Parameters in memory as a source, in any sharding over devices of this process; a layer is copied when read.

    Raises ValueError if they do not fit the config.
    """
    flat = flatten(params)
    hf.check_shapes("parameters", param_shapes(config), {name: array.shape for name, array in flat.items()})

    def read(name: str, layer: int | None) -> np.ndarray:
        return np.asarray(flat[name] if layer is None else flat[name][layer])

    return Source(Path("memory"), config, {name: np.dtype(a.dtype) for name, a in flat.items()}, read, tokenizer)
