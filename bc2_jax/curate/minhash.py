"""MinHash: short signatures that estimate the Jaccard similarity of two documents' shingles.

A shingle is five consecutive tokens. Each of eight hash functions puts every shingle into one of sixteen bins and keeps
the smallest hash of each bin (one-permutation hashing, Li, Owen and Zhang 2012). So a token costs eight operations,
where classical MinHash needs one for each of the 128 values. Empty bins borrow from others in an order that is the same
for all documents (Shrivastava 2017), which keeps the estimate unbiased.

Licence headers are left out: two short programs under one licence share more in their headers than they have of their
own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from bc2_jax.curate.tokens import Tokens, hash_ngrams, hash_tokens
from bc2_jax.data.ngrams import mix

SHINGLE = 5
FUNCTIONS, BINS = 8, 16
VALUES = FUNCTIONS * BINS
BANDS, ROWS = 16, 8
EMPTY = np.uint32(0xFFFFFFFF)
_PIECE = 1 << 16
# Bins that an empty bin borrows from, attempt by attempt; the last attempts cover all bins.
_BORROW = np.concatenate(
    [
        np.random.default_rng(20230919).integers(0, BINS, (4 * BINS, BINS)),
        (np.arange(BINS)[:, None] + np.arange(BINS)) % BINS,
    ]
)

# Characters in which a licence header is searched: the GPL's has 700, the longest in use about 3,000.
_LONGEST = 6000
_LICENCE = re.compile(
    r"(?i)\b(?:licen[cs]ed?|copyright|copyleft|spdx|all rights reserved|without warranty|warranties|redistribution)\b|"
    r"\(c\)|©|许可|版权|著作权|ライセンス|著作権"
)
# Comments to the end of a line with blank lines among them, and comments with a beginning and an end.
_LINES = re.compile(r"(?:[ \t]*(?:(?:#|//|--|;|%|'|!|\.\\\"|REM\b|rem\b|dnl\b).*)?(?:\n|$))+")
_BLOCK = re.compile(
    r"\s*(?:/\*.*?\*/|<!--.*?-->|\"\"\".*?\"\"\"|'''.*?'''|\(\*.*?\*\)|\{-.*?-\}|--\[\[.*?\]\])[ \t]*(?:\n|$)", re.S
)
_SHEBANG = re.compile(r"#!.*\n|<\?(?:php|xml\b[^\n]*)\s*\n|<!doctype[^\n]*\n", re.I)


def signatures(tokens: Tokens) -> np.ndarray:
    """uint32 [D, VALUES]; only EMPTY, which is similar to nothing, for a document of fewer than SHINGLE tokens."""
    shingles = hash_ngrams(tokens, SHINGLE)
    documents = len(tokens.offsets) - 1
    first_bin = np.repeat(np.arange(documents, dtype=np.int64) * BINS, np.diff(shingles.offsets))
    result = np.empty((documents, FUNCTIONS, BINS), np.uint32)
    for function in range(FUNCTIONS):
        smallest = np.full(documents * BINS, EMPTY, np.uint32)
        multiplier = np.uint64(int(mix(np.array([function + 1], np.uint64))[0]) | 1)
        for start in range(0, len(first_bin), _PIECE):
            hashes = shingles.hashes[start : start + _PIECE] * multiplier
            hashes ^= hashes >> np.uint64(31)
            bins = first_bin[start : start + _PIECE] + (hashes >> np.uint64(60)).astype(np.int64)
            # EMPTY marks a bin without shingles, so a hash is at most one less.
            np.minimum.at(smallest, bins, np.minimum(hashes.astype(np.uint32), EMPTY - np.uint32(1)))
        result[:, function] = _fill(smallest.reshape(documents, BINS))
    return result.reshape(documents, VALUES)


def _fill(bins: np.ndarray) -> np.ndarray:
    """Gives each empty bin the value of the first bin in its order that is not empty."""
    rows = np.flatnonzero((bins == EMPTY).any(1) & (bins != EMPTY).any(1))
    original = bins[rows]
    filled = original.copy()
    for attempt in _BORROW:
        empty = filled == EMPTY
        if not empty.any():
            break
        filled = np.where(empty, original[:, attempt], filled)
    bins[rows] = filled
    return bins


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimates of the Jaccard similarities of rows of signatures, float32 [N].

    The standard error is about sqrt(J (1 - J) / 128).
    """
    equal = (one == other) & (one != EMPTY)
    return equal.mean(axis=-1, dtype=np.float32)


def bands(signature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(signature, key) int64 each, BANDS for each document with a signature; similar documents share a key.

    Documents of similarity J share one with probability 1 - (1 - J^8)^16: .9999 at .9, .95 at .8, .61 at .7.
    """
    index = np.flatnonzero(signature[:, 0] != EMPTY)
    # A band takes its values from all functions.
    values = signature[index].reshape(-1, FUNCTIONS, BINS).transpose(0, 2, 1).astype(np.uint64)
    keys = np.tile(np.arange(BANDS, dtype=np.uint64), (len(index), 1))
    for row in range(ROWS):
        keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + values[:, :, row])
    return np.repeat(index, BANDS), keys.reshape(-1).view(np.int64)


def header_end(text: str) -> int:
    """Characters of the licence header at the beginning of a text, 0 if there is none.

    It has all comments at the beginning, up to the last one that names a licence or a copyright.
    """
    beginning = text[:_LONGEST]
    place = end = 0
    if found := _SHEBANG.match(beginning):
        place = found.end()
    while place < len(beginning):
        found = _BLOCK.match(beginning, place) or _LINES.match(beginning, place)
        if found is None or found.end() == place:
            break
        place = found.end()
        if _LICENCE.search(found[0]):
            end = place
    return end


def header_tokens(texts: Sequence[str]) -> np.ndarray:
    """int64 [D]: tokens in the licence header of each text; 0 if fewer than SHINGLE tokens would be left."""
    ends = [header_end(text) for text in texts]
    places = [place for place, end in enumerate(ends) if end]
    counts = np.zeros(len(texts), np.int64)
    counts[places] = np.diff(hash_tokens([texts[place][: ends[place]] for place in places]).offsets)
    # The rest is hashed only as far as needed.
    rest = np.diff(hash_tokens([texts[place][ends[place] :][: 64 * SHINGLE] for place in places]).offsets)
    counts[np.array(places, int)[rest < SHINGLE]] = 0
    return counts
