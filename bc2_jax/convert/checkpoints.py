"""Finding bc2_jax checkpoints in the folder of a run, and reading their metadata and array headers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bc2_jax import manifest
from bc2_jax.convert import orbax
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.metadata import is_complete, read_metadata
from bc2_jax.validation import check_path


def newest_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint of a run (its folder, or `checkpoints` in it), or `path` if it is one."""
    for folder in (path / "checkpoints", path):
        if folder.is_dir():
            steps = [p for p in folder.iterdir() if re.fullmatch("[0-9]+", p.name) and is_complete(p)]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    return path if is_complete(path) else None


def open_metadata(checkpoint: Path) -> dict[str, Any]:
    """The metadata of a checkpoint; one sentence, whatever is wrong with its path or the JSON that Orbax reads it from.

    Raises ValueError.
    """
    check_path("path", checkpoint)
    manifest.refuse_links(checkpoint)
    file = checkpoint / "_CHECKPOINT_METADATA"
    try:
        json.loads(file.read_bytes())
        metadata = read_metadata(checkpoint)
        if not isinstance(metadata.get("generation"), dict | None):
            raise ValueError(f"generation = {metadata['generation']!r} is not a generation config")
        return metadata
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} is damaged: {orbax.explain(error)}.") from error


def open_params(checkpoint: Path, process: int = 0, count: int = 1) -> dict[str, Any]:
    """Our path -> array of its parameters, whose bytes are what its manifest says, if it has one.

    Raises `manifest.DamagedCheckpoint`. Not through Orbax: of several damaged arrays it reports one, and its threads
    print a traceback for each other one.
    """
    if (checkpoint / manifest.MANIFEST_NAME).is_file():
        manifest.verify(checkpoint, process, count, below="params/")
    return orbax.open_arrays(checkpoint)
