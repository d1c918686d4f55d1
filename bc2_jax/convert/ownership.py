"""Which files are ours to replace: those that conversions write. All others are somebody's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bc2_jax.convert.checksums import SUMS_NAME, read_sha256sums

_EXPORT = re.compile(
    r"SHA256SUMS|(generation_|tokenizer_)?config\.json|tokenizer\.(model|json)|chat_template\.jinja|"
    r"(model|pytorch_model)(-[0-9]{5}-of-[0-9]{5})?\.(safetensors|bin)(\.index\.json)?"
)
_ADAPTER = re.compile(r"SHA256SUMS|adapter_config\.json|adapter_model\.safetensors")
# _strings.json and the like are not ours: Orbax writes them for values that are not arrays.
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
    return _not_listed(folder, _EXPORT)


def foreign_in_adapter(folder: Path) -> list[str]:
    """Names of what `peft.save_peft` did not write to `folder`, told as in `foreign_in_export`."""
    return _not_listed(folder, _ADAPTER)


def _not_listed(folder: Path, ours: re.Pattern[str]) -> list[str]:
    """Names of what is not `ours` or not in SHA256SUMS."""
    if not folder.is_dir():
        return [folder.name]
    try:
        listed = {name for name, _ in read_sha256sums(folder / SUMS_NAME)} | {SUMS_NAME}
    except (OSError, ValueError):
        listed = set()
    return _others(folder, lambda name: name in listed and ours.fullmatch(name) is not None)


def foreign_in_checkpoint(folder: Path) -> list[str]:
    """Names of what is not of a params-only checkpoint: so the optimizer state and manifest of a training run are."""
    if not folder.is_dir():
        return [folder.name]
    is_checkpoint = all((folder / name).is_file() for name in ("_CHECKPOINT_METADATA", "params/_METADATA"))
    return _others(folder, lambda name: is_checkpoint and _CHECKPOINT.fullmatch(name) is not None, "params")


def foreign_in_gguf(file: Path) -> list[str]:
    """The name of `file` unless it is one that begins as GGUF does."""
    if not file.is_file():
        return [file.name]
    with file.open("rb") as handle:
        return [] if handle.read(4) == b"GGUF" else [file.name]


def _others(folder: Path, is_ours: Callable[[str], bool], inside: str | None = None) -> list[str]:
    """Names of what is not ours, folders as NAME/; links are not, wherever they lead.

    Only the folder `inside` is looked into: the target may be anything, a home directory too.
    """
    others = []
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if entry.name != inside:
                others.append(f"{entry.name}/")
                continue
            files = [path for path in entry.rglob("*") if path.is_symlink() or not path.is_dir()]
        else:
            files = [entry]
        names = ((path, path.relative_to(folder).as_posix()) for path in files)
        others += [name for path, name in names if path.is_symlink() or not is_ours(name)]
    return sorted(others)
