"""A corpus of packed rows: one folder (part) for each source, quality bucket and sampling weight.

    ROWS/corpus.json              parts, settings, input files, number of unreadable documents
    ROWS/problems.txt             one line for each unreadable document, if there are any
    ROWS/SOURCE/qBUCKET/          a part: packed rows as `packing` writes them, with their own manifest.json
    ROWS/SOURCE/qBUCKET/wWEIGHT/  parts of documents with different weights

Quality scores in 0..1 are cut at the fixed edges 1/N, 2/N, ...: a document's bucket does not depend on other documents,
so corpora that were made separately can be mixed.

All documents of a row are read equally often, so documents of different weight never share rows. The weight of a part
is a power of two; a weight between two of them is rounded up or down by a hash of the text, so that it is right in
expectation.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import json
import logging
import math
import os
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bc2_jax.data.packing import MANIFEST, RowManifest, load_manifest
from bc2_jax.validation import is_inside

logger = logging.getLogger(__name__)

CORPUS = "corpus.json"
PROBLEMS = "problems.txt"
_FORMAT = 1
_LONGEST_NAME = 120
Part = tuple[str, int, int]
"""Source, bucket of quality, and the exponent of the power of two that is the weight."""
_SLICE = 1 << 20


@dataclasses.dataclass(frozen=True)
class InputFile:
    """An input file."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class CorpusPart:
    """Documents of one source, quality bucket and weight. Counts leave out the held-out documents."""

    path: str
    """Folder, relative to the corpus."""
    source: str
    bucket: int
    min_score: float
    max_score: float
    """Exclusive, except 1."""
    documents: int
    tokens: int
    rows: int
    mean_weight: float
    """Sampling weight of its documents."""
    share: float
    """Suggested share of training tokens: tokens * mean_weight, over the sum of all parts."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The content of corpus.json."""

    sequence_length: int
    quality_buckets: int
    validation_fraction: float
    tokenizer_sha256: str
    documents: int
    """Documents read, empty and invalid ones included."""
    empty_documents: int
    invalid_documents: int
    parts: tuple[CorpusPart, ...]
    files: tuple[InputFile, ...]
    format: int = _FORMAT


def bucket_of(score: float, num_buckets: int) -> int:
    """The quality bucket of `score`."""
    return bisect.bisect_right([index / num_buckets for index in range(1, num_buckets)], score)


def weight_level(weight: float, text: str) -> int:
    """A positive `weight` rounded to a power of two, as its exponent; over texts, the mean power is `weight`.

    With a weight of 1.25, three of four texts give 0, and one of four gives 1.
    """
    mantissa, exponent = math.frexp(weight)  # weight = mantissa * 2^exponent, mantissa in 0.5..1
    if mantissa == 0.5:
        return exponent - 1
    digest = hashlib.blake2b(digest_size=8, person=b"sampling weight")
    for start in range(0, len(text), _SLICE):
        digest.update(text[start : start + _SLICE].encode())
    return exponent - 1 + (int.from_bytes(digest.digest(), "little") < (2 * mantissa - 1) * 2**64)


def name_parts(parts: Iterable[Part]) -> dict[Part, str]:
    """The path of each part, sorted: its bucket's folder, or one below it if the bucket has several weights."""
    chosen = sorted(set(parts))
    levels = collections.Counter((source, bucket) for source, bucket, _ in chosen)
    folders = {part: f"{folder_name(part[0])}/q{part[1]}" for part in chosen}
    return {part: name if levels[part[:2]] == 1 else f"{name}/w{2.0 ** part[2]:g}" for part, name in folders.items()}


def log_missing_rows(path: Path, corpus: Corpus) -> None:
    """Warns of what would stop a training run at its start."""
    if not any(load_manifest(path / part.path).validation.rows for part in corpus.parts):
        logger.warning(
            "no document is held out for validation (%g of %d documents): a training run, which evaluates, would not "
            "start with these rows alone; choose a larger validation fraction", corpus.validation_fraction,
            corpus.documents,
        )  # fmt: skip
    if not any(part.rows for part in corpus.parts):
        logger.warning("all documents are held out for validation: there is no row to train on")


def folder_name(source: str) -> str:
    """The folder name of a source: the source itself if it is plain, otherwise escaped as in a URL.

    Different sources have different names, and no name is a path out of the corpus.
    """
    name = urllib.parse.quote(source, safe=" +,@=")
    if name[0] in ". " or name in (CORPUS, PROBLEMS, MANIFEST):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > _LONGEST_NAME:
        # The % of an escape is always followed by two digits: no other source has this name.
        name = f"{name[: _LONGEST_NAME - 20]}%-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name


def load_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Reads PATH/corpus.json. Raises FileNotFoundError without one, ValueError for a damaged one or another format."""
    file = Path(path, CORPUS)
    if not file.is_file():
        raise FileNotFoundError(f"data.sources.path = {str(path)!r} has no {CORPUS}.")
    try:
        fields: dict[str, Any] = json.loads(file.read_bytes())
        fields["parts"] = tuple(CorpusPart(**part) for part in fields["parts"])
        fields["files"] = tuple(InputFile(**info) for info in fields["files"])
        corpus = Corpus(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(file)!r} does not describe a corpus, format {_FORMAT}: {error!r}.") from error
    if corpus.format != _FORMAT:
        raise ValueError(f"format = {corpus.format} in {str(file)!r} is not valid: this version reads {_FORMAT}.")
    for part in corpus.parts:
        if not is_inside(part.path):
            raise ValueError(
                f"parts.path = {part.path!r} in {str(file)!r} is not valid: it must be a folder beside it."
            )
    return corpus


@dataclasses.dataclass(frozen=True)
class PartFolder:
    """A folder of packed rows with the quality bucket and weight of its documents."""

    path: Path
    manifest: RowManifest
    bucket: int = 0
    mean_weight: float = 1.0


def list_parts(path: str | os.PathLike[str]) -> list[PartFolder]:
    """The folders of packed rows at `path`: a corpus's parts, those of one of its sources, or `path` itself.

    Raises FileNotFoundError or ValueError, naming `path`, if there are none.
    """
    folder = Path(path)
    for root in (folder, *folder.absolute().parents[:3]):
        if (root / CORPUS).is_file():
            chosen = [
                part
                for part in load_corpus(root).parts
                if (root / part.path).resolve().is_relative_to(folder.resolve())
            ]
            if chosen:
                return [
                    PartFolder(root / part.path, load_manifest(root / part.path), part.bucket, part.mean_weight)
                    for part in chosen
                ]
    return [PartFolder(folder, load_manifest(folder))]
