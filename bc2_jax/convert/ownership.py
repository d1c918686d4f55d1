"""Which files are ours to replace: those that conversions write. All others are somebody's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from bc2_jax.convert.checksums import SUMS_NAME, read_sha256sums

_EXPORT = re.compile(
    r"SHA256SUMS|(generation_|tokenizer_)?config\.json|tokenizer\.(model|json)|"
    r"(model|pytorch_model)(-[0-9]{5}-of-[0-9]{5})?\.(safetensors|bin)(\.index\.json)?"
)
# _strings.json and the like are not ours: Orbax writes them for values that are no arrays.
_CHECKPOINT = re.compile(
    r"_CHECKPOINT_METADATA|orbax\.checkpoint|commit_success\.txt|tokenizer\.model|"
    r"params/(_METADATA|_sharding|array_metadatas/process_[0-9]+|(ocdbt\.process_[0-9]+/)?(manifest\.ocdbt|d/[0-9a-f]+)|"
    r"[\w.]+/(zarr\.json|\.zarray|c(/[0-9]+)*|[0-9]+(\.[0-9]+)*))",
    re.ASCII,
)


def foreign_in_export(folder: Path) -> list[str]:
    """Names of what `hf_write.write_folder` did not write to `folder`.

    It lists what it writes in SHA256SUMS. Without that file everything is foreign, a release that was downloaded too.
    """
    if not folder.is_dir():
        return [folder.name]
    try:
        listed = {name for name, _ in read_sha256sums(folder / SUMS_NAME)} | {SUMS_NAME}
    except (OSError, ValueError):
        listed = set()
    return _others(folder, lambda name: name in listed and _EXPORT.fullmatch(name) is not None)


def foreign_in_checkpoint(folder: Path) -> list[str]:
    """Names of what is not of a params-only checkpoint: so the optimizer state and manifest of a training run are."""
    if not folder.is_dir():
        return [folder.name]
    is_checkpoint = all((folder / name).is_file() for name in ("_CHECKPOINT_METADATA", "params/_METADATA"))
    return _others(folder, lambda name: is_checkpoint and _CHECKPOINT.fullmatch(name) is not None)


def foreign_in_gguf(file: Path) -> list[str]:
    """The name of `file` unless it is one that begins as GGUF does."""
    if not file.is_file():
        return [file.name]
    with file.open("rb") as handle:
        return [] if handle.read(4) == b"GGUF" else [file.name]


def _others(folder: Path, is_ours: Callable[[str], bool]) -> list[str]:
    """Files, links and empty folders that are not ours; NAME/ for a folder that holds nothing else."""
    entries: list[str] = []
    for root, folders, files in os.walk(folder, onerror=_raise):
        place = Path(root).relative_to(folder)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        entries += [(place / name).as_posix() for name in files + links]
        if place.parts and not folders and not files:
            entries.append(f"{place.as_posix()}/")
    ours = {name for name in entries if is_ours(name) and not (folder / name).is_symlink()}
    shared = {name.partition("/")[0] for name in ours}
    others = set()
    for name in set(entries) - ours:
        top, slash, _ = name.partition("/")
        others.add(name if top in shared else top + slash)
    return sorted(others)


def _raise(error: OSError) -> None:
    raise error  # a folder that cannot be looked into is not ours to delete
