"""How much a document repeats itself: equal n-grams and lines, counted without sorting.

Shares are of tokens, not of characters as in Gopher's rules (Rae et al. 2021, Appendix A1.1): for Chinese, whose tokens
are characters, it is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from bc2_jax.curate.tokens import Tokens, hash_ngrams
from bc2_jax.data.ngrams import mix

_MULTIPLIER = 0xC2B2AE3D27D4EB4F


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 [D]: sums of values[offsets[d] : offsets[d + 1]], 0 for an empty segment."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums[offsets[1:]] - sums[offsets[:-1]]


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """int32 [N]: for each key the position of its first occurrence; fastest for some 10^5 keys, which fit the cache.

    Every position is written to its key's bucket, last to first, so that the bucket keeps the first. Keys that find
    another key there go into other buckets in the next round; each round settles at least one.
    """
    left = np.arange(len(keys), dtype=np.int32)
    first, values = left, keys
    bits = max(4, (2 * len(keys)).bit_length())
    table = np.empty(1 << bits, np.int32)
    multiplier = _MULTIPLIER
    while len(left):
        bucket = ((values * np.uint64(multiplier)) >> np.uint64(64 - bits)).astype(np.int64)
        table[bucket[::-1]] = left[::-1]
        found = table.take(bucket)
        if values is keys:
            first = found
        else:
            first[left] = found
        wrong = np.flatnonzero(keys.take(found) != values)
        left, values = left[wrong], values[wrong]
        multiplier = multiplier * _MULTIPLIER % (1 << 64)
    return first


def hash_segments(points: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """uint64 [S]: a hash of the characters from starts[s] to the next start; a final newline does not count.

    `points` is uint32 [C], `starts` ascend. 32 bits are a polynomial, the others the length: enough to tell apart the
    lines of one document.
    """
    powers, inverses = _place_powers(1 << max(16, len(points).bit_length()))
    values = (points - np.uint32(ord("\n"))) * powers[: len(points)]
    hashes = (np.add.reduceat(values, starts, dtype=np.uint32) * inverses[starts]).astype(np.uint64)
    ends = np.append(starts[1:], len(points))
    lengths = ends - starts - (points[ends - 1] == ord("\n"))
    return hashes | lengths.astype(np.uint64) << np.uint64(32)


@functools.cache
def _place_powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [count] each: powers of a number and of its inverse modulo 2^32."""
    base = 0x9E3779B1
    result = []
    for factor in (base, pow(base, -1, 1 << 32)):
        powers = np.full(count, factor, np.uint32)
        powers[0] = 1
        result.append(np.multiply.accumulate(powers, dtype=np.uint32))
    return result[0], result[1]


def document_keys(tokens: Tokens) -> np.ndarray:
    """Hashes that are equal only within a document."""
    counts = np.diff(tokens.offsets)
    salts = mix(np.arange(1, len(counts) + 1, dtype=np.uint64))
    return tokens.hashes ^ np.repeat(salts, counts)


def top_share(tokens: Tokens, n: int) -> np.ndarray:
    """float64 [D]: share of a document's tokens that its most frequent n-gram covers; 0 if none occurs twice.

    Occurrences that overlap count whole, as in Gopher's rule, so the share can be above 1.
    """
    ngrams = hash_ngrams(tokens, n)
    first = first_occurrences(document_keys(ngrams))
    counts = np.bincount(first, minlength=len(first))
    top = np.zeros(len(ngrams.offsets) - 1, np.int64)
    filled = np.flatnonzero(np.diff(ngrams.offsets))
    if len(filled):
        top[filled] = np.maximum.reduceat(counts, ngrams.offsets[filled])
    return np.where(top > 1, top * n, 0) / np.maximum(np.diff(tokens.offsets), 1)


def duplicate_share(tokens: Tokens, n: int) -> np.ndarray:
    """float64 [D]: share of a document's tokens in n-grams that have occurred in it before, each token once."""
    ngrams = hash_ngrams(tokens, n)
    first = first_occurrences(document_keys(ngrams))
    again = np.flatnonzero(first != np.arange(len(first)))
    # From places among the n-grams to places among the tokens.
    counts = np.diff(ngrams.offsets)
    document = np.searchsorted(ngrams.offsets, again, side="right") - 1
    starts = again + (tokens.offsets[:-1] - ngrams.offsets[:-1])[document]
    # A token is covered once: an n-gram adds what lies after the one before it.
    new = np.minimum(np.diff(starts, prepend=-n), n)
    covered = np.bincount(document, new, minlength=len(counts))
    return covered / np.maximum(np.diff(tokens.offsets), 1)


def take(tokens: Tokens, documents: np.ndarray) -> Tokens:
    """The tokens of some documents, given by ascending numbers."""
    counts = np.diff(tokens.offsets)
    chosen = np.zeros(len(counts), bool)
    chosen[documents] = True
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(counts[documents], out=offsets[1:])
    return Tokens(tokens.hashes[np.repeat(chosen, counts)], offsets)


def bounded(share: Callable[[Tokens, int], np.ndarray], tokens: Tokens, n: int, needed: np.ndarray) -> np.ndarray:
    """share(tokens, n) of the documents where `needed`, 0 elsewhere."""
    result = np.zeros(len(needed))
    documents = np.flatnonzero(needed)
    if len(documents):
        result[documents] = share(take(tokens, documents), n)
    return result
