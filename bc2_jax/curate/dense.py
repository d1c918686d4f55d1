"""Near-duplicates by dense features (paper section 2.1): the copies whose edits are too dense for banded MinHash.

An edit breaks every shingle that it touches: where 6 % of the tokens are changed, a quarter of the 5-token shingles are
gone, few bands of MinHash rows still agree, and the copy is missed. The cosine of dense features falls by a few percent
alone. It is coarse, and nearly blind to order, so that what it proposes is verified by the whole signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from bc2_jax.curate.clustering import exact_cosines
from bc2_jax.curate.config import DenseConfig
from bc2_jax.curate.embedding import check_features
from bc2_jax.validation import require

# Rows and columns of a block of cosines: 1 MB, and at worst a quarter of a million pairs.
_BLOCK = 512
# Pairs that are verified at a time.
_MOST_PAIRS = 1 << 14


class Pairs(NamedTuple):
    """Pairs of documents, each once, ordered by first, then by second."""

    first: np.ndarray
    """int64 [P]."""
    second: np.ndarray
    """int64 [P], greater than `first`."""
    cosine: np.ndarray
    """float32 [P]."""


def near_duplicates(
    features: np.ndarray,
    assignments: np.ndarray,
    jaccard: Callable[[np.ndarray, np.ndarray], np.ndarray],
    config: DenseConfig | None = None,
) -> Pairs:
    """The pairs of `candidate_pairs` that have at least the Jaccard similarity of `config`, capped by `most_earlier`.

    `jaccard` takes two int64 [p], documents, and gives float [p]; for example the share of equal values of their
    MinHash signatures. Blocks are verified and capped as they are found, so that memory does not grow with the
    candidates.
    """
    config = config or DenseConfig()

    def verified() -> Iterator[Pairs]:
        for pairs in _pairs(features, assignments, config.cosine, config.clusters_per_document):
            parts = range(0, len(pairs.first), _MOST_PAIRS)
            similar = [jaccard(*(x[i : i + _MOST_PAIRS] for x in pairs[:2])) >= config.jaccard for i in parts]
            if similar:
                yield _earliest(_take(pairs, np.concatenate(similar)), config.most_earlier)

    return _earliest(_collect(verified(), len(features)), config.most_earlier)


def candidate_pairs(features: np.ndarray, assignments: np.ndarray, threshold: float) -> Pairs:
    """All pairs of documents that share a cluster and have a cosine of at least `threshold`.

    `features` float16 [n, dim], rows of `embedding.unit_rows`, whose cosines are exact; `assignments` int32 [n, top],
    the nearest clusters of each document (`clustering.assign`; -1 is none). Memory beside the result: the features
    of one cluster and some 50 MB. Time grows with the square of the sizes of the clusters.
    Raises ValueError if the arrays do not belong together.
    """
    return _collect(_pairs(features, assignments, threshold), len(features))


def _pairs(
    features: np.ndarray, assignments: np.ndarray, threshold: float, nearest: int | None = None
) -> Iterator[Pairs]:
    """Pairs by blocks; those of two clusters may be the same."""
    check_features(features, "features")
    shape = assignments.shape
    require(len(shape) == 2 and shape[0] == len(features), "assignments", shape, f"it must be [{len(features)}, top]")
    require(0 < threshold <= 1, "threshold", threshold, "it must be in (0, 1]")
    assignments = assignments[:, :nearest]
    clusters = assignments.ravel()
    order = np.argsort(clusters, kind="stable")
    order = order[np.searchsorted(clusters[order], 0) :]
    for group in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
        members = group // max(assignments.shape[1], 1)  # ascending, as the sort is stable
        blocks = [_padded(features[members[i : i + _BLOCK]]) for i in range(0, len(members), _BLOCK)]
        for top, rows in enumerate(blocks):
            for left, columns in enumerate(blocks[top:], top):
                found = np.asarray(_block_cosines(rows, columns))
                i, j = np.nonzero(found >= threshold)
                first, second = members[i + top * _BLOCK], members[j + left * _BLOCK]
                yield _take(Pairs(first, second, found[i, j]), first < second)


# XLA, because two threads of a BLAS hinder each other where others use the cores too.
_block_cosines = jax.jit(exact_cosines)


def _padded(rows: np.ndarray) -> np.ndarray:
    """With zeros to a whole block, so that one program does for all; they are in no pair, as thresholds are above 0."""
    block = np.zeros((_BLOCK, rows.shape[1]), rows.dtype)
    block[: len(rows)] = rows
    return block


def _take(pairs: Pairs, which: np.ndarray) -> Pairs:
    return Pairs(*(array[which] for array in pairs))


def _earliest(pairs: Pairs, count: int) -> Pairs:
    """Of pairs ordered by first, the `count` first ones of each second; the order is kept."""
    order = np.argsort(pairs.second, kind="stable")
    starts = np.flatnonzero(np.diff(pairs.second[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return _take(pairs, np.sort(order[rank < count]))


def _collect(blocks: Iterator[Pairs], documents: int) -> Pairs:
    empty = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    pairs = Pairs(*(np.concatenate(arrays) for arrays in zip(empty, *blocks, strict=True)))
    return _take(pairs, np.unique(pairs.first * documents + pairs.second, return_index=True)[1])
