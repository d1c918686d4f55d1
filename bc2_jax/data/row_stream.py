"""Packed rows read back as token streams and documents.

Position p of a split's stream is an input of row p // T. The stream of rows of conversations is the inputs of all rows
without the padding; its documents are the samples, in rows of pairs a prompt with both answers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bc2_jax.data.ngrams import hash_positions, mix
from bc2_jax.data.packing import MANIFEST, SPLITS, RowManifest, Split, check_files, iterate_rows, load_manifest
from bc2_jax.data.row_file import BRANCH, START, RowFile, token_ids
from bc2_jax.validation import require


@dataclasses.dataclass(frozen=True)
class RowSource:
    """A folder of packed rows."""

    name: str
    """Path below the searched folder."""
    path: Path
    manifest: RowManifest


def find_sources(folders: Sequence[str | os.PathLike[str]]) -> list[RowSource]:
    """All packed rows in and below `folders`, sorted by path, without hidden folders.

    Raises FileNotFoundError if a folder has none or a file is missing, ValueError if one is damaged or if tokenizers or
    sequence lengths differ.
    """
    roots = [Path(folder).resolve() for folder in folders]
    paths: set[Path] = set()
    for root in roots:
        # Unfinished rows are in hidden folders.
        visible = (file for file in root.rglob(MANIFEST) if not any(p[0] == "." for p in file.relative_to(root).parts))
        found = {file.parent for file in visible}
        if not found:
            raise FileNotFoundError(f"ROWS = {str(root)!r} is not valid: it must hold a {MANIFEST} of packed rows.")
        paths |= found
    shared = Path(os.path.commonpath(roots))
    shared = shared.parent if shared in paths else shared
    sources: list[RowSource] = []
    for path in sorted(paths):
        source = RowSource(str(path.relative_to(shared)), path, load_manifest(path))
        for split in SPLITS:
            check_files(path, source.manifest, split)
        sources.append(source)
    for source in sources:
        for field in ("tokenizer_sha256", "sequence_length"):
            first, here = getattr(sources[0].manifest, field), getattr(source.manifest, field)
            require(here == first, f"{field} of {source.name}", here, f"{sources[0].name} has {first}; all must agree")
    return sources


def stream_tokens(source: RowSource, split: Split) -> Iterator[tuple[int, np.ndarray]]:
    """The stream of a split as (position, tokens uint32 [any]), without the pads at its end.

    Rows of conversations come one at a time, with their flags.
    """
    length, pad_id = source.manifest.sequence_length, source.manifest.pad_id
    start = seen = 0
    for rows in iterate_rows(source.path, split):
        if source.manifest.kind != "text":
            for row in rows[:, :length]:
                yield seen * length, row[row != pad_id]
                seen += 1
            continue
        tokens = rows[:, 1:].reshape(-1)
        if seen == 0:
            tokens = np.concatenate([rows[0, :1], tokens])
        seen += len(rows)
        if seen == source.manifest.split(split).rows:  # only the last row is filled with pads
            tokens = tokens[: np.flatnonzero(tokens != pad_id)[-1] + 1]
        yield start, tokens
        start += len(tokens)


def read_document(source: RowSource, split: Split, position: int, max_tokens: int) -> np.ndarray:
    """Up to `max_tokens` tokens from `position` to the end of the document, uint32 [any]. Raises BadRow."""
    manifest, wanted = source.manifest, max_tokens
    row, offset = divmod(position, manifest.sequence_length)
    parts = [np.empty(0, "<u4")]
    for info in manifest.split(split).files:
        with RowFile(source.path, info, manifest.sequence_length) as file:
            while row < file.rows and wanted > 0:
                part = np.frombuffer(file.read(row), "<u4")[offset:][:wanted]
                parts.append(part)
                wanted -= len(part)
                row, offset = row + 1, 1
        row -= info.rows
    tokens = np.concatenate(parts)
    starts, branches, tokens = (tokens & START) > 0, (tokens & BRANCH) > 0, token_ids(tokens)
    starts[:1] = False
    is_last = tokens == manifest.eos_id
    is_last[:-1] &= ~branches[1:]  # of the branch before the last one
    ends = np.flatnonzero(is_last | (tokens == manifest.pad_id) | starts)
    return tokens[: ends[0]] if ends.size else tokens


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of a stream, in order; arrays [D]."""

    start: np.ndarray
    """int64: position of the first token."""
    length: np.ndarray
    """int64: tokens without the eos."""
    hash: np.ndarray
    """uint64: of the tokens without the eos."""


class DocumentScan:
    """Cuts a stream, in the chunks of `stream_tokens`, into documents."""

    def __init__(self, eos_id: int) -> None:
        self._eos_id = eos_id
        self._start = 0
        """Start of the unfinished document."""
        self._hash = np.uint64(0)
        self.unfinished = 0
        """Tokens after the last eos."""

    def add(self, start: int, tokens: np.ndarray) -> Documents:
        """The documents that end in the chunk `tokens` at `start`; those of a row of conversations are its samples."""
        if len(tokens) and tokens[0] >= START:
            return self._samples(start, tokens)
        ends = np.flatnonzero(tokens == self._eos_id)
        starts = np.concatenate([[self._start], start + ends + 1])
        stops = np.concatenate([start + ends, [start + len(tokens)]])
        lengths = stops - starts
        here = np.minimum(lengths, stops - start)
        # Each token's position in its document; the eos is left out of the hash.
        positions = np.arange(start, start + len(tokens)) - np.repeat(starts, here + np.append(np.ones_like(ends), 0))
        # uint64 sums wrap around, so differences of running sums are sums of stretches.
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hash_positions(tokens, positions), dtype=np.uint64)])
        hashes = sums[stops - start] - sums[np.maximum(starts - start, 0)]
        hashes[:1] += self._hash
        self._start, self._hash, self.unfinished = int(starts[-1]), hashes[-1], int(lengths[-1])
        return Documents(starts[:-1], lengths[:-1], mix(hashes[:-1]))

    def _samples(self, start: int, tokens: np.ndarray) -> Documents:
        starts, ids = np.flatnonzero(tokens & START), token_ids(tokens)
        stops = np.append(starts[1:], len(tokens))
        hashes = hash_positions(ids, np.arange(len(ids)) - np.repeat(starts, stops - starts))
        is_end = ids == self._eos_id  # one that was cut has none, a pair has two
        hashes[is_end] = 0
        return Documents(start + starts, stops - starts - is_end[stops - 1], mix(np.add.reduceat(hashes, starts)))
