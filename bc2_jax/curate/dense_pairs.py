"""Pairs of documents that are near in feature space, verified by their signatures; pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from bc2_jax.curate import clustering
from bc2_jax.curate.config import DenseConfig
from bc2_jax.curate.features import check_features
from bc2_jax.validation import require

# Rows and columns of a block of cosines: 1 MB, and at most a quarter of a million pairs.
_BLOCK = 512
# Pairs verified at a time.
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
    config: DenseConfig,
    part: int = 0,
    parts: int = 1,
) -> Pairs:
    """Pairs of documents in a common cluster with at least the cosine and the Jaccard similarity of `config`.

    `features` float16 [n, dim] are rows of `features.unit_rows`, whose cosines are exact; `assignments` int32
    [n, top] are the nearest clusters of each document (`clustering.assign`; -1 is none). `jaccard` takes two int64
    [p], documents, and gives float [p], for example the share of equal values of their MinHash signatures. Of each
    document's earlier near-duplicates the first `config.most_earlier` are kept. Pairs are verified block by block, so
    memory beside the result is the features of one cluster and some 50 MB. Time grows with the square of the sizes of
    the clusters. `part` of `parts` compares that share of the blocks: the earliest pairs of all parts together are
    those of one call. Raises ValueError if the arrays do not fit together.
    """

    def verified() -> Iterator[Pairs]:
        for pairs in _candidates(features, nearest, config.cosine, part, parts):
            starts = range(0, len(pairs.first), _MOST_PAIRS)
            similar = [jaccard(*(x[i : i + _MOST_PAIRS] for x in pairs[:2])) >= config.jaccard for i in starts]
            if similar:
                yield _earliest(_take(pairs, np.concatenate(similar)), config.most_earlier)

    check_features(features, "features")
    shape = assignments.shape
    require(len(shape) == 2 and shape[0] == len(features), "assignments", shape, f"it must be [{len(features)}, top]")
    nearest = assignments[:, : config.clusters_per_document]
    return _earliest(_collect(verified(), len(features)), config.most_earlier)


def _candidates(
    features: np.ndarray, assignments: np.ndarray, threshold: float, part: int, parts: int
) -> Iterator[Pairs]:
    """Pairs in a common cluster with a cosine of at least `threshold`, in blocks; a pair may come twice."""
    clusters = assignments.ravel()
    order = np.argsort(clusters, kind="stable")
    order = order[np.searchsorted(clusters[order], 0) :]
    for group in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
        members = group // max(assignments.shape[1], 1)  # ascending, as the sort is stable
        blocks = [_padded(features[members[i : i + _BLOCK]]) for i in range(0, len(members), _BLOCK)]
        for top, rows in list(enumerate(blocks))[part::parts]:
            for left, columns in enumerate(blocks[top:], top):
                found = np.asarray(_block_cosines(rows, columns))
                i, j = np.nonzero(found >= threshold)
                first, second = members[i + top * _BLOCK], members[j + left * _BLOCK]
                yield _take(Pairs(first, second, found[i, j]), first < second)


# XLA, because the threads of a BLAS slow each other down where other threads use the cores too.
_block_cosines = jax.jit(clustering.exact_cosines)


def _padded(rows: np.ndarray) -> np.ndarray:
    """Zero rows added to a whole block, so that one program serves all; they are in no pair: thresholds are above 0."""
    block = np.zeros((_BLOCK, rows.shape[1]), rows.dtype)
    block[: len(rows)] = rows
    return block


def _take(pairs: Pairs, which: np.ndarray) -> Pairs:
    return Pairs(*(array[which] for array in pairs))


def _earliest(pairs: Pairs, count: int) -> Pairs:
    """Of pairs ordered by first, the first `count` of each second, in the same order."""
    order = np.argsort(pairs.second, kind="stable")
    starts = np.flatnonzero(np.diff(pairs.second[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return _take(pairs, np.sort(order[rank < count]))


def _collect(blocks: Iterator[Pairs], documents: int) -> Pairs:
    """All pairs in one, each once."""
    empty = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    pairs = Pairs(*(np.concatenate(arrays) for arrays in zip(empty, *blocks, strict=True)))
    return _take(pairs, np.unique(pairs.first * documents + pairs.second, return_index=True)[1])
