"""Contamination: documents that share n-grams of 13 tokens with benchmark files.

The procedure is GPT-3's (Brown et al. 2020, arXiv 2005.14165, Appendix C): n-grams of 13 words, fewer for a benchmark
of short items but at least 8; n-grams in many documents are not evidence. A token is a word or one Han character; a
Chinese word has about 1.6 characters, so n is 1.6 times as large there. Different from GPT-3: case counts, and
documents are reported or dropped whole instead of being cut.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bc2_jax.curate.tokens import (
    choose_tokens,
    count_characters,
    find_ngrams,
    hash_ngrams,
    hash_tokens,
    token_starts,
)
from bc2_jax.data.benchmark_items import read_items
from bc2_jax.data.ngrams import NgramTable, make_table
from bc2_jax.validation import require

_SHORTEST = 8
# Characters of a word in scripts without spaces, and how many of them make a text one of these.
_CHARACTERS = 1.6
_LEAST_CHARACTERS = 8
_PERCENTILE = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """Benchmarks, and when a document counts as contaminated."""

    files: tuple[str, ...] = ()
    """Benchmarks, one item a line: .jsonl or .txt. None switches the test off."""
    fields: tuple[str, ...] = ("question", "prompt", "text", "input", "choices", "answer")
    """Fields of a .jsonl item that are searched for, with all that lists and objects contain. Passages that questions
    are about are left out: they are public text."""
    n: int = 13
    """Words of an n-gram; in Chinese 1.6 times as many characters. For a file of short items n is the 5th percentile of
    their lengths but at least 8 (13 characters); shorter items are not found."""
    max_items: int = 10
    """An n-gram in more items of its file is the template of the questions, not evidence."""
    max_documents: int = 10
    """An n-gram in more documents of the corpus is a common phrase, not evidence (GPT-3: 10)."""
    min_share: float = 0.0
    """A contaminated document contains more than this share of an item's n-grams."""
    action: str = "drop"
    """drop or report."""

    def __post_init__(self) -> None:
        require(self.n >= _SHORTEST, "contamination.n", self.n, f"it must be at least {_SHORTEST}")
        require(0 <= self.min_share < 1, "contamination.min_share", self.min_share, "it must be in [0, 1)")
        for field in ("max_items", "max_documents"):
            require(getattr(self, field) > 0, f"contamination.{field}", getattr(self, field), "it must be positive")
        require(self.action in ("drop", "report"), "contamination.action", self.action, "legal values are drop, report")
        for file in self.files:
            require(file.endswith((".jsonl", ".txt")), "contamination.files", file, "it must end with .jsonl or .txt")


@dataclasses.dataclass(frozen=True)
class BenchmarkNgrams:
    """The n-grams of benchmarks with their items."""

    items: tuple[str, ...]
    """Name of each item: file name and line, from 1."""
    tables: tuple[NgramTable, ...]
    """One for each n; the numbers of n-grams are those of items."""

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Different n-grams of each item, int64 [items]."""
        numbers = [table.numbers for table in self.tables]
        return np.bincount(np.concatenate([np.empty(0, np.int64), *numbers]), minlength=len(self.items))

    def without_frequent(self, documents: Sequence[np.ndarray], limit: int) -> BenchmarkNgrams:
        """A copy without n-grams in more than `limit` documents; `documents` sums `count_documents` over all shards.

        Shares are of the remaining n-grams; an item without any is never found.
        """
        tables = []
        for table, counts in zip(self.tables, documents, strict=True):
            kept = counts <= limit
            tables.append(NgramTable(table.n, table.hashes[kept], table.numbers[kept]))
        return BenchmarkNgrams(self.items, tuple(tables))


class Match(NamedTuple):
    """A document that contains part of a benchmark item."""

    document: int
    item: str
    share: float
    """Share of the item's different n-grams that the document contains."""
    ngram: str
    """The first of them, as written in the document."""


def load_benchmark_ngrams(
    files: Sequence[str | os.PathLike[str]], config: ContaminationConfig | None = None
) -> BenchmarkNgrams:
    """The n-grams of all items in `files`. Raises ValueError for a file without items or that `read_items` refuses."""
    config = config or ContaminationConfig()
    items: list[str] = []
    rows: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for file in map(Path, files):
        names: list[str] = []
        parts: list[str] = []
        owners: list[int] = []
        for line, texts in read_items(file, config.fields):
            owners += [len(names)] * len(texts)
            parts += texts
            names.append(f"{file.name}:{line}")
        require(len(parts) > 0, "contamination.files", str(file), f"it has no text in {', '.join(config.fields)}")
        tokens, owner = hash_tokens(parts), np.array(owners, np.int64)
        unspaced = np.array([count_characters(part) >= _LEAST_CHARACTERS for part in parts])
        for chosen, scale in ((~unspaced, 1.0), (unspaced, _CHARACTERS)):
            lengths = np.bincount(owner[chosen], np.diff(tokens.offsets)[chosen])
            lengths = lengths[lengths > 0]
            if not len(lengths):
                continue
            shortest, longest = math.ceil(scale * _SHORTEST), math.ceil(scale * config.n)
            n = int(np.clip(np.percentile(lengths, _PERCENTILE), shortest, longest))
            ngrams = hash_ngrams(choose_tokens(tokens, chosen), n)
            numbers = np.repeat(owner[chosen], np.diff(ngrams.offsets))
            pairs = np.unique(np.stack([ngrams.hashes, numbers.astype(np.uint64)]), axis=1)
            _, place, count = np.unique(pairs[0], return_inverse=True, return_counts=True)
            pairs = pairs[:, count[place] <= config.max_items]
            rows.setdefault(n, []).append((pairs[0], pairs[1].astype(np.int64) + len(items)))
        items += names
    tables = []
    for n in sorted(rows):
        hashes, numbers = zip(*rows[n], strict=True)
        tables.append(make_table(n, np.concatenate(hashes), np.concatenate(numbers)))
    return BenchmarkNgrams(tuple(items), tuple(tables))


def find_contaminated(texts: Sequence[str], ngrams: BenchmarkNgrams, min_share: float = 0.0) -> list[Match]:
    """Every pair of a document and an item that share more than `min_share` of the item's n-grams, by document."""
    tokens = hash_tokens(texts)
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    shared: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for table in ngrams.tables:
        documents, rows = find_ngrams(table, tokens)
        for document, row in zip(documents.tolist(), rows.tolist(), strict=True):
            pair = document, int(table.numbers[row])
            counts[pair] += 1
            n, hashes = shared.setdefault(pair, (table.n, []))
            if n == table.n:
                hashes.append(int(table.hashes[row]))
    matches = []
    for (document, number), count in sorted(counts.items()):
        share = count / int(ngrams.sizes[number])
        if share > min_share:
            ngram = _first_shared(texts[document], *shared[document, number])
            matches.append(Match(document, ngrams.items[number], share, ngram))
    return matches


def _first_shared(text: str, n: int, hashes: Sequence[int]) -> str:
    """The first n-gram of a text with one of these hashes, as written."""
    grams = hash_ngrams(hash_tokens([text]), n).hashes
    first = int(np.flatnonzero(np.isin(grams, np.array(hashes, np.uint64)))[0])
    starts = np.append(token_starts(text), len(text))
    return " ".join(text[starts[first] : starts[first + n]].split())


def count_documents(texts: Sequence[str], ngrams: BenchmarkNgrams) -> list[np.ndarray]:
    """For each table the number of texts that contain each n-gram, int64 [rows]; sums over shards are those of all."""
    tokens = hash_tokens(texts)
    return [np.bincount(find_ngrams(table, tokens)[1], minlength=len(table.hashes)) for table in ngrams.tables]
