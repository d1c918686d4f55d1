"""Files of preference pairs -> packed rows of them, for preference tuning and reward models.

    OUT/pairs.jsonl           the held-out pairs, {"prompt": [...], "chosen": [...], "rejected": [...]} with all other
                              fields of their records

beside the files of `row_preparation`, whose manifest has the kind "pairs" and says how many pairs a row has at most.
Rows of `row_length` inputs hold whole pairs: the prompt once, then both answers (`data.row_file`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from bc2_jax.align.chat_rows import EncodedSamples
from bc2_jax.align.formats import Sample, find_files
from bc2_jax.align.pair_rows import Pair, as_pair, encode_pairs
from bc2_jax.align.preparation_settings import Content, Settings
from bc2_jax.align.row_preparation import prepare
from bc2_jax.config import TrainConfig
from bc2_jax.data.corpus import CORPUS
from bc2_jax.data.packing import MANIFEST
from bc2_jax.data.pinned_package import default_cache
from bc2_jax.files import InUse, file_sha256, fingerprint
from bc2_jax.tokenizer import Tokenizer

PAIRS = "pairs.jsonl"
_FORMAT = 1
"""Of the rows; another one makes those in the cache useless."""
_WAIT_SECONDS = 1.0
_log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=TrainConfig)


def _encode(tokenizer: Tokenizer, settings: Settings, pairs: Sequence[Pair]) -> EncodedSamples:
    return encode_pairs(tokenizer, pairs, settings.max_length, settings.inputs, settings.truncation)


def split_pair(sample: Sample) -> Pair:
    """The messages of a preference pair: those that both answers follow, and the answers."""
    assert sample.rejected is not None
    return Pair(sample.messages[: sample.shared], sample.messages[sample.shared :], sample.rejected)


def _describe(sample: Sample) -> dict[str, Any]:
    return {**split_pair(sample)._asdict(), **sample.fields}


PAIR_ROWS = Content(
    kind="pairs", accept=as_pair, text=split_pair, encode=_encode, held_out=PAIRS, describe=_describe
)  # fmt: skip
prepare_pairs = functools.partial(prepare, PAIR_ROWS)
"""`prepare` of preference pairs."""


def prepare_sources(config: Config, cache: Path | None = None) -> Config:
    """`config` with packed rows in the place of each source that names files of pairs; rows stay as they are.

    `config.data.tokenizer` is that of the model. Rows of data.sequence_length tokens are made once for the same
    contents, tokenizer and length, in a folder of `cache`, by default $XDG_CACHE_HOME/bc2_jax or ~/.cache/bc2_jax:
    processes with a cache in common make them once, others make the same, and the folder's name says of what. Raises as
    `prepare_pairs`.
    """
    cache = default_cache() if cache is None else cache
    settings = Settings(max_length=config.data.sequence_length)
    sources = []
    for index, source in enumerate(config.data.sources):
        if not _is_packed(Path(source.path)):
            field = f"data.sources.{index}.path"
            path = _prepare_once([source.path], field, config.data.tokenizer, cache / "pairs", settings)
            source = dataclasses.replace(source, path=str(path))
        sources.append(source)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=tuple(sources)))


def _is_packed(path: Path) -> bool:
    """Whether it is a folder of rows, or one of those that a corpus of them is made of."""
    folders = (path, *path.absolute().parents[:3])
    return (path / MANIFEST).is_file() or any((folder / CORPUS).is_file() for folder in folders)


def _prepare_once(inputs: list[str], field: str, tokenizer: str, cache: Path, settings: Settings) -> Path:
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
