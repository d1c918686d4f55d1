"""Finding some known n-grams in all n-grams of many documents."""

from __future__ import annotations

import dataclasses

import numpy as np

from bc2_jax.curate.tokens import Tokens, hash_ngrams, token_pieces


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """Known n-grams of one size, each with the number of what it stands for; an n-gram may be there several times."""

    n: int
    hashes: np.ndarray
    """uint64 [K], ascending."""
    numbers: np.ndarray
    """int64 [K]."""


def make_table(n: int, hashes: np.ndarray, numbers: np.ndarray) -> NgramTable:
    """A table of these n-grams, in any order."""
    order = np.argsort(hashes, kind="stable")
    return NgramTable(n, hashes[order], np.asarray(numbers, np.int64)[order])


def find_ngrams(table: NgramTable, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """(documents, rows of the table), int64 each, for every n-gram of the table that a document has, once."""
    empty = np.empty(0, np.int64)
    if not len(table.hashes):
        return empty, empty
    # A flag for the low bits of every hash, 32 to 64 flags a row: few others get as far as the binary search.
    flags = np.zeros(1 << max(16, int(len(table.hashes) - 1).bit_length() + 5), bool)
    low = np.uint64(len(flags) - 1)
    flags[table.hashes & low] = True
    found = [(empty, empty)]
    for start, piece in token_pieces(tokens):
        grams = hash_ngrams(piece, table.n)
        places = np.flatnonzero(flags.take((grams.hashes & low).astype(np.int64)))
        left = np.searchsorted(table.hashes, grams.hashes[places], side="left")
        right = np.searchsorted(table.hashes, grams.hashes[places], side="right")
        real = np.flatnonzero(right > left)
        left, right = left[real], right[real]
        documents = np.searchsorted(grams.offsets, places[real], side="right") - 1 + start
        sizes = right - left
        # left[0] .. right[0] - 1, left[1] .. right[1] - 1 and so on.
        rows = np.arange(sizes.sum()) + np.repeat(left - np.cumsum(sizes) + sizes, sizes)
        pairs = np.unique(np.stack([np.repeat(documents, sizes), rows]), axis=1)
        found.append((pairs[0], pairs[1]))
    return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])
