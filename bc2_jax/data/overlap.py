"""N-grams of integers as 64-bit hashes, and which n-grams of a fixed list of items occur in a stream.

The integers may be token ids, code points or hashes of words. With unrelated n-grams two hashes agree with a chance of
2^-64; nothing here defends against text that was made to collide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

# The finalizer of splitmix64 (Steele, Lea and Flood 2014, with the constants of Stafford's variant 13).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
# Odd, so that multiplying by it loses nothing.
_LEFT = np.uint64(0xD6E8FEB86659FD93)
_FILTER_BITS = range(10, 28)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit of the input moves every bit of the result; one pass, no table."""
    values = values + _GAMMA
    values ^= values >> _SHIFTS[0]
    values *= _FACTORS[0]
    values ^= values >> _SHIFTS[1]
    values *= _FACTORS[1]
    values ^= values >> _SHIFTS[2]
    return values


def hash_ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of each window of `n` neighbours of `tokens`: uint64 [max(0, len(tokens) - n + 1)].

    `tokens` is any integer array [L]. Entry i depends on tokens i .. i + n - 1, their order and n, and on nothing else,
    so hashes of different arrays, runs and machines can be compared. Windows of 2, 4, 8, ... tokens are hashed from
    pairs of shorter ones, so the cost is about 2 log2(n) passes. Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n} is not valid: it must be positive.")
    if len(tokens) < n:
        return np.empty(0, np.uint64)
    windows = mix(tokens.astype(np.uint64))
    size, result, length = 1, np.empty(0, np.uint64), 0
    while True:
        if n & size:
            result = _join(result, windows, length) if length else windows
            length += size
        if 2 * size > n:
            return result[: len(tokens) - n + 1]
        windows = _join(windows, windows, size)
        size *= 2


def _join(left: np.ndarray, right: np.ndarray, offset: int) -> np.ndarray:
    """Windows of `left` that go on in `right`, `offset` tokens later."""
    count = min(len(left), len(right) - offset)
    joined = left[:count] * _LEFT
    joined += right[offset : offset + count]
    return mix(joined)


def hash_positions(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A hash of each token with its position: uint64 [L]; their sum modulo 2^64 is a hash of a whole sequence.

    Sums of stretches add up, so a sequence can be hashed in pieces. Tokens and positions must be below 2^32.
    """
    return mix((positions.astype(np.uint64) << np.uint64(32)) | tokens.astype(np.uint64))


class HashSet:
    """A fixed set of uint64 hashes, for looking up many at a time.

    A Bloom filter of at most 16 MiB, asked for a hash's first and then for its last bits, rejects most strangers; the
    others cost a search, which is a hundred times slower.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        # With the inverse NumPy sorts; without it, it uses a hash table that is slower than that.
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
class ItemHit:
    """An item of which something was found."""

    item: int
    ngrams: int
    """N-grams of the item, repeated ones counted again."""
    found: int
    """How many of them occur in the streams."""
    stream: int
    position: int
    """The first of them that the item has: where it was seen first."""


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
        """Looks through `tokens` [L], which stand at `start` of stream number `stream` (at least 0).

        If they go on where the call before ended, n-grams across the boundary are seen too.
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
