"""Files of preference pairs as sources of a run: packed once into rows in a cache."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import TypeVar

from bc2_jax.align.formats import find_files
from bc2_jax.align.preparation_settings import RowSettings
from bc2_jax.align.row_preparation import prepare_pairs
from bc2_jax.config import TrainConfig
from bc2_jax.data.corpus import CORPUS
from bc2_jax.data.packing import MANIFEST
from bc2_jax.data.pinned_package import default_cache
from bc2_jax.files import InUse, file_sha256, fingerprint

_FORMAT = 1
"""Of the rows; another number makes the cached ones useless."""
_WAIT_SECONDS = 1.0
_log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainConfig)


def prepare_sources(config: Config, cache: Path | None = None) -> Config:
    """`config` with each source that names files of pairs replaced by packed rows.

    Rows of data.sequence_length tokens are made with the model's tokenizer, `config.data.tokenizer`, in a subfolder of
    `cache` (default $XDG_CACHE_HOME/bc2_jax or ~/.cache/bc2_jax) named after contents, tokenizer and length. Processes
    with a common cache make them once. Raises as `prepare_pairs`.
    """
    cache = default_cache() if cache is None else cache
    settings = RowSettings(max_length=config.data.sequence_length)
    sources = []
    for index, source in enumerate(config.data.sources):
        if not _is_packed(Path(source.path)):
            field = f"data.sources.{index}.path"
            path = _prepare_once([source.path], field, config.data.tokenizer, cache / "pairs", settings)
            source = dataclasses.replace(source, path=str(path))
        sources.append(source)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=tuple(sources)))


def _is_packed(path: Path) -> bool:
    """Whether `path` is a folder of rows, or a part of a corpus of rows."""
    folders = (path, *path.absolute().parents[:3])
    return (path / MANIFEST).is_file() or any((folder / CORPUS).is_file() for folder in folders)


def _prepare_once(inputs: list[str], field: str, tokenizer: str, cache: Path, settings: RowSettings) -> Path:
    files = find_files(inputs, field).files
    facts = {
        "format": _FORMAT, "settings": dataclasses.asdict(settings), "tokenizer": file_sha256(tokenizer),
        "files": [file_sha256(file.path) for file in files],
    }  # fmt: skip
    folder = cache / fingerprint(facts, sort_keys=False)[:24]
    said = False
    while not (folder / MANIFEST).is_file():
        try:
            counts = prepare_pairs(inputs, tokenizer, folder, settings)
        except FileExistsError:
            if not (folder / MANIFEST).is_file():  # others make a folder whole or not at all
                raise
        except InUse as error:  # by another process of this run, or another run
            if not said:
                _log.info("%s: waiting for the rows of the pairs (%s)", field, error)
            said = True
            time.sleep(_WAIT_SECONDS)
        else:
            left_out = sum(counts.invalid.values()) + sum(counts.dropped.values())
            _log.info(
                "%s: %d pairs in %d rows, %d held out, %d left out, %d cut: %s", field, counts.samples, counts.rows,
                counts.held_out, left_out, counts.cut, folder,
            )  # fmt: skip
    return folder
