"""N-grams as 64-bit hashes: a set, a table and a scan that find known n-grams in token streams.

Tokens may be token ids, code points or hashes of words. Unrelated n-grams share a hash with a chance of 2^-64;
text that was constructed to collide is not detected.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

# Odd, so that multiplying by it loses nothing.
MULTIPLIER = 0x9E3779B97F4A7C15
_FILTER_BITS = range(10, 28)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def hash_windows(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each window of `n` neighbours of `hashes`, uint64 [L]: uint64 [max(0, L - n + 1)].

    Entry i depends on hashes i .. i + n - 1, their order and n alone, so results of different arrays and machines can
    be compared. Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n} is not valid: it must be positive.")
    size = max(0, len(hashes) - n + 1)
    combined = hashes[:size].copy()
    for i in range(1, n if size else 0):
        combined *= np.uint64(MULTIPLIER)
        combined += hashes[i : i + size]
    return mix(combined)


def hash_ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """The hash of each n-gram of integers [L]: uint64 [max(0, L - n + 1)]; see `hash_windows`."""
    return hash_windows(mix(tokens.astype(np.uint64) + np.uint64(1)), n)  # 0 would hash to 0


def hash_positions(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A hash of each token with its position: uint64 [L]; their sum modulo 2^64 is a hash of the sequence.

    Sums of stretches add up, so a sequence can be hashed in pieces. Tokens and positions must be below 2^32.
    """
    return mix(((positions.astype(np.uint64) << np.uint64(32)) | tokens.astype(np.uint64)) + np.uint64(1))


class HashSet:
    """A fixed set of uint64 hashes that looks up many at a time.

    A Bloom filter of at most 16 MiB, asked for a hash's first and then for its last bits, rejects most strangers; the
    others cost a binary search, which is a hundred times slower.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        # np.unique sorts for the inverse; without it, it uses a hash table, which is slower.
        self.hashes, self.entries = np.unique(hashes, return_inverse=True)
        """uint64 [U], sorted; and where in it each given hash is, int64 [L]."""
        bits = min(max((16 * len(self.hashes)).bit_length(), _FILTER_BITS[0]), _FILTER_BITS[-1])
        self._shift, self._mask = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
        present = np.zeros(1 << bits, bool)
        present[self.hashes >> self._shift] = True
        present[self.hashes & self._mask] = True
        self._filter = np.packbits(present, bitorder="little")

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which entries of `hashes` [L] are in the set, in order, and where in `self.hashes`: int64 [M] twice."""
        places = np.flatnonzero(self._is_present(hashes >> self._shift))
        places = places[self._is_present(hashes[places] & self._mask)]
        if not places.size:
            return places, places
        candidates = hashes[places]
        entries = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        same = self.hashes[entries] == candidates
        return places[same], entries[same]

    def _is_present(self, slots: np.ndarray) -> np.ndarray:
        octets = self._filter[(slots >> np.uint64(3)).view(np.int64)]
        return ((octets >> (slots & np.uint64(7)).astype(np.uint8)) & np.uint8(1)).view(bool)


@dataclasses.dataclass(frozen=True)
class NgramTable:
    """Known n-grams of one size, each with the number of what it belongs to; make it with `make_table`."""

    n: int
    hashes: np.ndarray
    """uint64 [K], ascending, repeated where several things have the n-gram."""
    numbers: np.ndarray
    """int64 [K]."""

    @functools.cached_property
    def _index(self) -> tuple[HashSet, np.ndarray]:
        """The different hashes, and at which row each begins, int64 [U + 1]."""
        known = HashSet(self.hashes)
        return known, np.append(np.searchsorted(self.hashes, known.hashes), len(self.hashes))

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every (entry of `hashes`, uint64 [L]; row of the table) with the same n-gram: int64 [M] twice."""
        known, starts = self._index
        places, entries = known.find(hashes)
        first, sizes = starts[entries], starts[entries + 1] - starts[entries]
        # first[0], first[0] + 1 ... of every entry one after the other
        rows = np.arange(sizes.sum()) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)
        return np.repeat(places, sizes), rows


def make_table(n: int, hashes: np.ndarray, numbers: np.ndarray) -> NgramTable:
    """A table of these n-grams, in any order."""
    order = np.argsort(hashes, kind="stable")
    return NgramTable(n, hashes[order], np.asarray(numbers, np.int64)[order])


@dataclasses.dataclass(frozen=True)
class ItemHit:
    """An item of which an n-gram was found."""

    item: int
    ngrams: int
    """N-grams of the item, repeated ones counted again."""
    found: int
    """How many of them occur in the streams."""
    stream: int
    position: int
    """Where the first of these n-grams, in the order of the item, was seen first."""


class ItemOverlap:
    """Finds n-grams of a fixed list of items in streams of tokens, each seen once, in chunks.

    `items` gives the hashes of an item's n-grams, uint64 [any], as `hash_ngrams` makes them. Memory is about 65 bytes
    an n-gram of the items and does not grow with the streams.
    """

    def __init__(self, items: Iterable[np.ndarray], n: int) -> None:
        hashes = list(items)
        self.n = n
        self.ngrams = np.array([len(item) for item in hashes], np.int64)
        """N-grams of each item; an item shorter than n has none and is never found."""
        flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._set = HashSet(flat)
        self._stream = np.full(len(self._set.hashes), -1, np.int64)
        self._position = np.zeros(len(self._set.hashes), np.int64)
        self._tail: tuple[int, int, np.ndarray] = (-1, 0, np.empty(0, np.uint32))

    def add(self, stream: int, start: int, tokens: np.ndarray) -> None:
        """Searches `tokens` [L], which stand at `start` of stream number `stream` (at least 0).

        If they continue where the previous call ended, n-grams across the boundary are found too.
        """
        if not len(self._set.hashes):
            return
        tail_stream, tail_start, tail = self._tail
        if (tail_stream, tail_start + len(tail)) == (stream, start):
            tokens, start = np.concatenate([tail, tokens]), tail_start
        places, entries = self._set.find(hash_ngrams(tokens, self.n))
        entries, first = np.unique(entries, return_index=True)
        new = self._stream[entries] < 0
        self._stream[entries[new]] = stream
        self._position[entries[new]] = start + places[first[new]]
        kept = min(self.n - 1, len(tokens))
        self._tail = stream, start + len(tokens) - kept, tokens[len(tokens) - kept :]

    def hits(self) -> list[ItemHit]:
        """The items of which at least one n-gram was found, in the order of `items`."""
        found = self._stream[self._set.entries] >= 0
        ends = np.cumsum(self.ngrams)
        hits = []
        for item in np.unique(np.searchsorted(ends, np.flatnonzero(found), side="right")):
            here = slice(ends[item] - self.ngrams[item], ends[item])
            entry = self._set.entries[here][np.argmax(found[here])]
            count = int(found[here].sum())
            place = int(self._stream[entry]), int(self._position[entry])
            hits.append(ItemHit(int(item), int(self.ngrams[item]), count, *place))
        return hits
