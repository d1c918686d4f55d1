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
from bc2_jax.convert.checksums import SUMS_NAME
from bc2_jax.convert.hf_config import read_generation_config
from bc2_jax.convert.ownership import foreign_in_checkpoint
from bc2_jax.convert.pretrained import FoundModel, find_model
from bc2_jax.convert.table import Reader, flatten, layers_of, param_shapes, read_layer, torch_name


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in `path`, a PyTorch folder in the released layout or a checkpoint of ours."""

    path: Path
    config: ModelConfig
    dtypes: Mapping[str, np.dtype]
    """Our path -> dtype on disk."""
    read: Reader
    """(our path, layer) -> array, in the dtype on disk; a view of a file that is mapped while it lives, or a copy."""
    tokenizer: Path | None
    """tokenizer.model beside it."""
    generation: Mapping[str, Any] | None = None
    """generation_config.json, as it came with a release."""
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


def open_source(path: str | Path) -> Source:
    """The model in `path`; nothing read but metadata.

    Raises FileNotFoundError or ValueError, in one sentence, if it is not whole and consistent.
    """
    found = find_model(path)
    return _open_torch(found) if found.format == "pytorch" else _open_orbax(found)


def _open_orbax(found: FoundModel) -> Source:
    folder, config = found.path, found.config
    arrays = orbax.open_arrays(folder)
    hf.check_shapes(f"arrays of {folder}", param_shapes(config), {name: array.shape for name, array in arrays.items()})
    hashes = {}
    if (folder / manifest.MANIFEST_NAME).is_file():
        states = sorted(manifest.read_manifest(folder).items())
        hashes = {folder / name: state.sha256 for name, state in states if name.startswith("params/")}
    training = {"opt_state/", manifest.MANIFEST_NAME}
    return Source(
        folder, config, {name: array.dtype.numpy_dtype for name, array in arrays.items()},
        lambda name, layer: orbax.read_part(arrays[name], layer), found.tokenizer, found.metadata.get("generation"),
        tuple(hashes), hashes, (folder / "opt_state").is_dir(),
        tuple(name for name in foreign_in_checkpoint(folder) if name not in training),
    )  # fmt: skip


def _open_torch(found: FoundModel) -> Source:
    folder, config = found.path, found.config
    tensors = hf.open_folder(folder)
    hf.check_tensors(config, tensors)

    def read(name: str, layer: int | None) -> np.ndarray:
        return read_layer(config, lambda n: tensors[n].read(), name, layer)

    dtypes = {name: tensors[torch_name(name)].dtype for name in param_shapes(config)}
    generation = read_generation_config(folder)
    files = tuple(sorted({tensor.file for tensor in tensors.values()}))
    return Source(folder, config, dtypes, read, found.tokenizer, generation, files, unread=_unread(folder, files))


def _unread(folder: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """What lies beside the weight files of a PyTorch folder and is not read; hidden files are not mentioned."""
    read = {file.name for file in files} | {TOKENIZER_NAME, SUMS_NAME, "config.json", "generation_config.json"}
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
