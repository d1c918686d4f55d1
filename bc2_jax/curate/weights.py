"""Sampling weights of documents: size of their cluster, quality, source (paper section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bc2_jax.validation import require

# Halvings of an interval of real numbers, until float64 has none between its ends.
_HALVINGS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How often documents are read in training."""

    cluster_exponent: float = 0.3
    """A document of a cluster c times as large as the median one has c^-exponent of the weight; 0 ignores clusters, 1
    reads all clusters equally often."""
    score_strength: float = 0.7
    """The best document has e^(2 strength) times the weight of the worst; 0 ignores scores."""
    sources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Factor by source, 1 for those not named: above 1 up-samples reputable sites."""
    least: float = 0.25
    """Lower bound of a weight, at most 1; above 0, so that nothing that passed the filters is lost."""
    most: float = 4.0
    """Upper bound of a weight, at least 1: more than about four repetitions of a text add little (arXiv 2305.16264)."""

    def __post_init__(self) -> None:
        for field in ("cluster_exponent", "score_strength"):
            value = getattr(self, field)
            require(0 <= value <= 10, f"weights.{field}", value, "it must be in 0..10")
        require(0 < self.least <= 1, "weights.least", self.least, "it must be in (0, 1]")
        require(1 <= self.most < np.inf, "weights.most", self.most, "it must be at least 1")
        for source, factor in self.sources.items():
            require(0 < factor < np.inf, f"weights.sources[{source!r}]", factor, "it must be positive")


def sampling_weights(
    cluster_sizes: np.ndarray,
    clusters: np.ndarray,
    scores: np.ndarray,
    sources: Sequence[str] | np.ndarray,
    config: WeightsConfig | None = None,
    *,
    sizes: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [n] > 0: how often each document should be read where the corpus as a whole is read once.

        w = source * (cluster size / median size)^-cluster_exponent * exp(score_strength * (2 q - 1))
        weight = min(max(s w, least), most)

    q in 0..1 is the rank of the document's score among all, equal scores sharing one: ranks, and not scores, because a
    score has no scale. A power of the size, because copies that are too different to be removed gather in large
    clusters, which are about what many wrote and not about what is worth more. s is such that the mean weight over
    `sizes` (int [n], bytes or tokens; documents count equally by default) is 1: a budget of tokens is then spent as
    planned, and a longer training run multiplies all weights. Clusters are counted by `cluster_sizes` [k], in documents
    or bytes; `clusters` int [n] are theirs.

    Raises ValueError if lengths differ, a cluster, size or score is not valid, or config.sources names an unknown one.
    """
    config = config or WeightsConfig()
    sources = np.asarray(sources, dtype=str)
    n = len(clusters)
    sizes = np.ones(n) if sizes is None else sizes.astype(np.float64)
    for name, array in (("scores", scores), ("sources", sources), ("sizes", sizes)):
        require(len(array) == n, name, array.shape, f"there are {n} documents")
    if not n:
        return np.empty(0, np.float32)
    lowest, highest = int(clusters.min()), int(clusters.max())
    require(lowest >= 0, "clusters", lowest, "they must be at least 0")
    require(highest < len(cluster_sizes), "clusters", highest, f"there are {len(cluster_sizes)} sizes of clusters")
    smallest = cluster_sizes[clusters].min().item()
    require(smallest > 0, "cluster_sizes", smallest, "a cluster with a document must have a size above 0")
    require(bool(np.isfinite(scores).all()), "scores", scores[~np.isfinite(scores)][:1].tolist(), "they must be finite")
    require(sizes.min() >= 0 and sizes.max() > 0, "sizes", sizes.min().item(), "they must be at least 0, and one above")
    names, source_ids = np.unique(sources, return_inverse=True)
    for source in config.sources:
        legal = "sources of the documents are " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        require(source in names, "weights.sources", source, legal)

    factors = np.array([config.sources.get(str(name), 1.0) for name in names], np.float64)[source_ids]
    relative = cluster_sizes / np.median(cluster_sizes[cluster_sizes > 0])
    factors *= relative[clusters] ** -config.cluster_exponent
    factors *= np.exp(config.score_strength * (2 * _ranks(scores) - 1))
    return _scaled(factors, sizes, config.least, config.most).astype(np.float32)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """In 0..1: the share of documents with a lower score, half of those with an equal one (but itself) included."""
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    return (
        ((below + (counts - 1) / 2) / max(len(scores) - 1, 1))[index] if len(counts) > 1 else np.full(len(scores), 0.5)
    )


def _scaled(factors: np.ndarray, sizes: np.ndarray, least: float, most: float) -> np.ndarray:
    """min(max(s * factors, least), most) with a mean over `sizes` of 1. It rises with s: halve the interval."""
    low, high = least / factors.max(), most / factors.min()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        mean = (np.clip(middle * factors, least, most) * sizes).sum() / sizes.sum()
        low, high = (middle, high) if mean < 1 else (low, middle)
    return np.clip(high * factors, least, most)
