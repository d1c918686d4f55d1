"""MinHash: short signatures from which the Jaccard similarity of two documents' shingles can be told.

A shingle is five consecutive tokens. Each of eight hash functions puts every shingle into one of sixteen bins and keeps
the smallest hash of each bin (one-permutation hashing, Li, Owen and Zhang 2012), so that a token costs eight operations
where classical MinHash needs one for each of the 128 values; bins that stay empty borrow from others in an order that
is the same for all documents (Shrivastava 2017), which keeps the estimate unbiased.
"""

from __future__ import annotations

import numpy as np

from bc2_jax.curate.tokens import Tokens, hash_ngrams
from bc2_jax.data.ngrams import mix

SHINGLE = 5
FUNCTIONS, BINS = 8, 16
VALUES = FUNCTIONS * BINS
BANDS, ROWS = 16, 8
EMPTY = np.uint32(0xFFFFFFFF)
_PIECE = 1 << 16
# Where an empty bin looks, attempt by attempt; the last attempts go round all bins.
_BORROW = np.concatenate(
    [
        np.random.default_rng(20230919).integers(0, BINS, (4 * BINS, BINS)),
        (np.arange(BINS)[:, None] + np.arange(BINS)) % BINS,
    ]
)


def signatures(tokens: Tokens) -> np.ndarray:
    """uint32 [D, VALUES]. A document of fewer than SHINGLE tokens has only EMPTY, and is similar to nothing."""
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
            # One below EMPTY at most, which marks a bin without any.
            np.minimum.at(smallest, bins, np.minimum(hashes.astype(np.uint32), EMPTY - np.uint32(1)))
        result[:, function] = _fill(smallest.reshape(documents, BINS))
    return result.reshape(documents, VALUES)


def _fill(bins: np.ndarray) -> np.ndarray:
    """Empty bins get the value of the first bin in their own order that is not empty."""
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

    Their standard error is about sqrt(J (1 - J) / 128).
    """
    equal = (one == other) & (one != EMPTY)
    return equal.mean(axis=-1, dtype=np.float32)


def bands(signature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys under which similar documents meet: (index of the signature, int64 key), BANDS for each with a signature.

    Two documents of similarity J share a key with probability 1 - (1 - J^8)^16: .9999 at .9, .95 at .8, .61 at .7.
    """
    index = np.flatnonzero(signature[:, 0] != EMPTY)
    # A band takes its values from all functions.
    values = signature[index].reshape(-1, FUNCTIONS, BINS).transpose(0, 2, 1).astype(np.uint64)
    keys = np.tile(np.arange(BANDS, dtype=np.uint64), (len(index), 1))
    for row in range(ROWS):
        keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + values[:, :, row])
    return np.repeat(index, BANDS), keys.reshape(-1).view(np.int64)
