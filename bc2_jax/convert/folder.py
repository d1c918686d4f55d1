"""Output that is complete or absent, and which existing files a conversion may replace.

A result is written beside its target and renamed when it is complete. An existing target is replaced only if everything
in it was written by a conversion.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bc2_jax.convert.checksums import SUMS_NAME, read_sha256sums
from bc2_jax.files import lock, sync
from bc2_jax.validation import join_some, require

_EXPORT = re.compile(
    r"SHA256SUMS|(generation_|tokenizer_)?config\.json|tokenizer\.(model|json)|chat_template\.jinja|"
    r"(model|pytorch_model)(-[0-9]{5}-of-[0-9]{5})?\.(safetensors|bin)(\.index\.json)?"
)
_ADAPTER = re.compile(r"SHA256SUMS|adapter_config\.json|adapter_model\.safetensors")
# Not _strings.json and the like, which Orbax writes for values that are not arrays.
_CHECKPOINT = re.compile(
    r"_CHECKPOINT_METADATA|orbax\.checkpoint|commit_success\.txt|tokenizer\.model|"
    r"params/(_METADATA|_sharding|array_metadatas/process_[0-9]+|(ocdbt\.process_[0-9]+/)?(manifest\.ocdbt|d/[0-9a-f]+)|"
    r"[\w.]+/(zarr\.json|\.zarray|c(/[0-9]+)*|[0-9]+(\.[0-9]+)*))",
    re.ASCII,
)
# File systems allow 255 bytes; staging, locking and Orbax add up to 43.
_MAX_NAME = 210

Foreign = Callable[[Path], list[str]]
"""Names of files in an existing target that no conversion wrote, such as `foreign_in_export`."""


def check_free(target: Path, overwrite: bool, foreign: Foreign) -> None:
    """Raises FileExistsError if `target` exists and may not be replaced: without `overwrite`, if it is a link, or if it
    has files that `foreign` names. Raises ValueError if its name is too long.
    """
    length = len(os.fsencode(target.name))
    legal = f"its name has {length} bytes; at most {_MAX_NAME} are possible"
    require(length <= _MAX_NAME, "target", str(target), legal)
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; pass --overwrite to replace it.")
    if target.is_symlink():
        raise FileExistsError(f"{target} is a link and is not replaced: give the path it points to.")
    if names := foreign(target):
        raise FileExistsError(
            f"{target} is not replaced, as no conversion wrote {join_some(names, 8)}: move it away or choose "
            "another target."
        )


@contextlib.contextmanager
def written_whole(target: Path, overwrite: bool, foreign: Foreign) -> Iterator[Path]:
    """Yields a new path .NAME.partial-XXXXXXXX for a folder or file; at the end of the block it is synced and renamed
    to `target`.

    The target is locked meanwhile: another process gets `files.InUse`. Remains of a killed owner are removed. If the
    block raises, its output is removed and `target` stays as it was; an older `target` is deleted only after the new
    one has its name. Raises FileExistsError as `check_free`, also for a target that appears meanwhile.
    """
    target = target.absolute()
    check_free(target, overwrite, foreign)
    with lock(target.with_name(f".{target.name}.lock"), f"The target {target}") as owned:
        if owned:
            _clean_up(target)
        check_free(target, overwrite, foreign)
        token = secrets.token_hex(4)
        partial = target.with_name(f".{target.name}.partial-{token}")
        try:
            yield partial
            _sync_all(partial)
            check_free(target, overwrite, foreign)
            _replace(partial, target, target.with_name(f".{target.name}.replaced-{token}"))
        finally:
            for left in _leftovers(target, token):
                _remove(left)


def _leftovers(target: Path, token: str = "[0-9a-f]{8}") -> list[Path]:
    """Unfinished outputs of `written_whole`; Orbax adds to the name while it writes."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-{token}(\.orbax-checkpoint-tmp.*)?", re.DOTALL)
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]


def _clean_up(target: Path) -> None:
    """Removes remains of dead owners; restores a target whose owner was killed while replacing it."""
    for left in _leftovers(target):
        if left.name.startswith(f".{target.name}.replaced-") and not target.exists():
            left.rename(target)
        else:
            _remove(left)


def _replace(partial: Path, target: Path, old: Path) -> None:
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise
    sync(target.parent)


def _sync_all(path: Path) -> None:
    """So that no file under its final name is empty after a power cut."""
    for root, _, names in os.walk(path):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))
    if not path.is_dir():
        sync(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def foreign_in_export(folder: Path) -> list[str]:
    """Names of files in `folder` that `hf_write.write_folder` did not write.

    It lists its files in SHA256SUMS. Without that file everything is foreign, including a downloaded release.
    """
    return _not_listed(folder, _EXPORT)


def foreign_in_adapter(folder: Path) -> list[str]:
    """Names of files in `folder` that `peft.save_peft` did not write; uses SHA256SUMS as `foreign_in_export`."""
    return _not_listed(folder, _ADAPTER)


def _not_listed(folder: Path, ours: re.Pattern[str]) -> list[str]:
    """Names of files that do not match `ours` or are not in SHA256SUMS."""
    if not folder.is_dir():
        return [folder.name]
    try:
        listed = {name for name, _ in read_sha256sums(folder / SUMS_NAME)} | {SUMS_NAME}
    except (OSError, ValueError):
        listed = set()
    return _others(folder, lambda name: name in listed and ours.fullmatch(name) is not None)


def foreign_in_checkpoint(folder: Path) -> list[str]:
    """Names of files that are not part of a params-only checkpoint, such as optimizer state and a manifest."""
    if not folder.is_dir():
        return [folder.name]
    is_checkpoint = all((folder / name).is_file() for name in ("_CHECKPOINT_METADATA", "params/_METADATA"))
    return _others(folder, lambda name: is_checkpoint and _CHECKPOINT.fullmatch(name) is not None, "params")


def foreign_in_gguf(file: Path) -> list[str]:
    """The name of `file` unless it starts like a GGUF file."""
    if not file.is_file():
        return [file.name]
    with file.open("rb") as handle:
        return [] if handle.read(4) == b"GGUF" else [file.name]


def _others(folder: Path, is_ours: Callable[[str], bool], inside: str | None = None) -> list[str]:
    """Names of files that are not ours, folders as NAME/; a link is never ours.

    Looks only into the subfolder `inside`: the target may be anything, even a home directory.
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
