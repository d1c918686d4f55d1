"""Inspecting packed rows: document lengths, copies of held-out documents and benchmark items in training data.

Rows are read once, as a stream of tokens in chunks. Memory grows with the held-out documents and the benchmarks, not
with the training rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bc2_jax.data.benchmark_items import read_items
from bc2_jax.data.ngrams import HashSet, ItemHit, ItemOverlap, hash_ngrams
from bc2_jax.data.packing import RowManifest, Split
from bc2_jax.data.row_file import token_ids
from bc2_jax.data.row_stream import Documents, DocumentScan, RowSource, stream_tokens
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

BINS_PER_OCTAVE = 4
_BINS = 32 * BINS_PER_OCTAVE + 1
_BEGINNING = 80
Advance = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Counts of the rows of one split of a source; characters and bytes are the manifest's. Documents of rows of
    conversations are samples."""

    source: str
    split: Split
    rows: int
    documents: int
    tokens: int
    """Of the stream, with eos, without padding."""
    padding: int
    characters: int
    bytes: int
    longest_document: int
    """In tokens without the eos, as all lengths."""
    length_histogram: tuple[int, ...]
    """Entry b counts the documents of 2^(b / 4) to 2^((b + 1) / 4) tokens."""
    unfinished_tokens: int
    """After the last eos."""

    def differences(self, manifest: RowManifest) -> list[str]:
        """Differences between the rows and the manifest."""
        info = manifest.split(self.split)
        return [
            f"{self.source} {self.split}: {getattr(self, field):,} {field} in the rows, {getattr(info, field):,} in "
            f"the manifest"
            for field in ("rows", "documents", "tokens", "padding")
            if getattr(self, field) != getattr(info, field)
        ]


def count_split(
    source: RowSource, split: Split, visit: Callable[[int, np.ndarray, Documents], object], advance: Advance
) -> SplitCounts:
    """Reads a split once; calls visit(position, tokens, documents that end in them) and advance(number of tokens)."""
    info = source.manifest.split(split)
    scan = DocumentScan(source.manifest.eos_id)
    histogram = np.zeros(_BINS, np.int64)
    documents = tokens = longest = 0
    for start, chunk in stream_tokens(source, split):
        found = scan.add(start, chunk)
        visit(start, token_ids(chunk), found)
        bins = np.floor(BINS_PER_OCTAVE * np.log2(np.maximum(found.length, 1))).astype(np.int64)
        histogram += np.bincount(bins, minlength=_BINS)
        documents += len(found.length)
        tokens += len(chunk)
        longest = max(longest, int(found.length.max(initial=0)))
        advance(len(chunk))
    rows = sum(file.rows for file in info.files)
    # Tokens shared by rows of text count once; the last one of a row of conversations is always padding.
    places = rows * source.manifest.sequence_length + (rows > 0 and source.manifest.kind == "text")
    filled = np.flatnonzero(histogram)
    trimmed = histogram[: filled[-1] + 1] if filled.size else histogram[:0]
    return SplitCounts(
        source.name, split, rows, documents, tokens, places - tokens, info.characters, info.bytes, longest,
        tuple(int(count) for count in trimmed), scan.unfinished,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """A position in the stream of a split."""

    source: str
    split: Split
    position: int
    row: int
    """The row in which it is an input."""


@dataclasses.dataclass(frozen=True)
class DuplicateDocument:
    """A held-out document that is in training too."""

    held_out: Place
    tokens: int
    training: Place
    """The equal document, or of a near one the first common n-gram."""
    share: float
    """Share of its n-grams that occur in training; 1 for an exact copy."""


@dataclasses.dataclass(frozen=True)
class BenchmarkHit:
    """A benchmark item with an n-gram that is in training."""

    file: str
    line: int
    beginning: str
    """First characters of the item."""
    training: Place
    """First place of the item's first n-gram that occurs in training."""
    share: float
    """Share of the item's n-grams that occur in training."""


@dataclasses.dataclass(frozen=True)
class BenchmarkItem:
    """A question with its choices and answer."""

    file: str
    line: int
    beginning: str
    """First characters."""
    hashes: np.ndarray
    """Hashes of its n-grams, uint64 [any]; none if it is shorter than n."""


@dataclasses.dataclass(frozen=True)
class BenchmarkCounts:
    """Counts of the items of one file."""

    file: str
    items: int
    short: int
    """Items too short to be found."""
    hit: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect_sources`."""

    ngram: int
    splits: tuple[SplitCounts, ...]
    differences: tuple[str, ...]
    """Differences between rows and manifests; empty unless something is damaged."""
    exact: tuple[DuplicateDocument, ...]
    near: tuple[DuplicateDocument, ...]
    near_share: float
    compared_documents: int
    """Held-out documents compared by n-grams; those shorter than n are compared only as a whole."""
    benchmarks: tuple[BenchmarkCounts, ...]
    hits: tuple[BenchmarkHit, ...]


class _HeldOut:
    """The held-out documents of all sources: their hashes, and the n-grams of a sample."""

    def __init__(self, sources: Sequence[RowSource], n: int, near_tokens: int) -> None:
        held_out = sum(source.manifest.validation.tokens for source in sources)
        # Sampled by hash: the order of sources and rows does not matter.
        self._limit = np.uint64(min(near_tokens / max(held_out, 1), 1.0) * (2**64 - 2**12))
        self._n = n
        self._open: list[np.ndarray] = []
        self.documents: list[tuple[int, Documents]] = []
        self.sampled: list[tuple[int, int, int]] = []
        """(source, start, length) of each sampled document."""
        self.ngrams: list[np.ndarray] = []

    def add(self, source: int, start: int, tokens: np.ndarray, found: Documents) -> None:
        self.documents.append((source, found))
        self._open.append(tokens)
        if not found.start.size:
            return
        here = np.concatenate(self._open)
        origin = start + len(tokens) - len(here)
        for first, length, code in zip(found.start, found.length, found.hash, strict=True):
            if code <= self._limit and length >= self._n:
                self.sampled.append((source, int(first), int(length)))
                self.ngrams.append(hash_ngrams(here[first - origin : first - origin + length], self._n))
        end = int(found.start[-1] + found.length[-1]) + 1
        self._open = [here[end - origin :]]


def inspect_sources(
    sources: Sequence[RowSource],
    benchmarks: Sequence[BenchmarkItem] = (),
    *,
    n: int = 13,
    near_share: float = 0.5,
    near_tokens: int = 8_000_000,
    advance: Advance = lambda tokens: None,
) -> Inspection:
    """Counts all splits; finds held-out documents and benchmark items in the training rows.

    A held-out document is an exact duplicate if a training document has the same tokens, a near one if at least
    `near_share` of its n-grams occur anywhere in training. An item is hit if one of its n-grams occurs. n-grams are of
    tokens, as in Llama 2 (Touvron et al. 2023, appendix A.6); n = 13 is GPT-3's (Brown et al. 2020, appendix C), there
    in words. Whitespace around a text may change its outermost n-grams. Of held-out documents with more than
    `near_tokens` tokens a sample of about that size is compared.
    """
    require(n >= 2, "ngram", n, "it must be at least 2")
    require(0 < near_share <= 1, "near_share", near_share, "it must be in (0, 1]")
    require(near_tokens > 0, "near_tokens", near_tokens, "it must be positive")
    held_out = _HeldOut(sources, n, near_tokens)
    validation = []
    for index, rows in enumerate(sources):
        validation.append(count_split(rows, "validation", functools.partial(held_out.add, index), advance))
    known = HashSet(np.concatenate([np.empty(0, np.uint64), *(found.hash for _, found in held_out.documents)]))
    copies: dict[int, tuple[int, int]] = {}
    near = ItemOverlap(held_out.ngrams, n)
    items = ItemOverlap([item.hashes for item in benchmarks], n)

    def visit(source: int, start: int, tokens: np.ndarray, found: Documents) -> None:
        for place in known.find(found.hash)[0]:
            copies.setdefault(int(found.hash[place]), (source, int(found.start[place])))
        near.add(source, start, tokens)
        items.add(source, start, tokens)

    train = [count_split(rows, "train", functools.partial(visit, index), advance) for index, rows in enumerate(sources)]
    splits = tuple(counts for pair in zip(train, validation, strict=True) for counts in pair)

    def place(source: int, split: Split, position: int) -> Place:
        row = position // sources[source].manifest.sequence_length
        return Place(sources[source].name, split, position, row)

    exact = [
        DuplicateDocument(place(source, "validation", int(start)), int(length), place(copy[0], "train", copy[1]), 1.0)
        for source, found in held_out.documents
        for start, length, code in zip(found.start, found.length, found.hash, strict=True)
        if (copy := copies.get(int(code)))
    ]
    are_exact = {copy.held_out for copy in exact}
    almost = []
    for hit in near.hits():
        source, start, length = held_out.sampled[hit.item]
        where = place(source, "validation", start)
        if _share(hit) >= near_share and where not in are_exact:
            almost.append(DuplicateDocument(where, length, place(hit.stream, "train", hit.position), _share(hit)))
    hits = [
        BenchmarkHit(item.file, item.line, item.beginning, place(hit.stream, "train", hit.position), _share(hit))
        for hit in items.hits()
        for item in [benchmarks[hit.item]]
    ]
    return Inspection(
        ngram=n,
        splits=splits,
        differences=tuple(
            difference
            for rows, pair in zip(sources, zip(train, validation, strict=True), strict=True)
            for counts in pair
            for difference in counts.differences(rows.manifest)
        ),
        exact=tuple(exact),
        near=tuple(almost),
        near_share=near_share,
        compared_documents=len(held_out.sampled),
        benchmarks=tuple(
            BenchmarkCounts(
                file,
                sum(item.file == file for item in benchmarks),
                sum(item.file == file and not len(item.hashes) for item in benchmarks),
                sum(hit.file == file for hit in hits),
            )
            for file in dict.fromkeys(item.file for item in benchmarks)
        ),
        hits=tuple(hits),
    )


def _share(hit: ItemHit) -> float:
    return hit.found / hit.ngrams


def read_benchmark(
    path: Path, tokenizer: Tokenizer, n: int, fields: Sequence[str] | None = None
) -> Iterator[BenchmarkItem]:
    """The items of a file (`read_items`). n-grams never cross strings, so the format of prompts does not matter."""
    for number, texts in read_items(path, fields):
        hashes = [hash_ngrams(np.array(ids, np.uint32), n) for ids in tokenizer.encode_batch(texts)]
        beginning = " ".join(texts)[:_BEGINNING]
        yield BenchmarkItem(str(path), number, beginning, np.concatenate([np.empty(0, np.uint64), *hashes]))
