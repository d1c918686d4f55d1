"""Sampling weights of documents by cluster size, quality, source and language (paper section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bc2_jax.validation import require

# Bisections until float64 has no number between the ends of the interval.
_HALVINGS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How often documents are sampled in training."""

    cluster_exponent: float = 0.3
    """In a cluster c times as large as the median, a document's weight is multiplied by c^-exponent; 0 ignores
    clusters, 1 samples all clusters equally often."""
    score_strength: float = 0.7
    """The best document has e^(2 strength) times the weight of the worst; 0 ignores scores."""
    sources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Factor by source, 1 if not named. Above 1 it up-samples a source, and with it the source's languages."""
    languages: dict[str, float] = dataclasses.field(default_factory=dict)
    """Factor by language (`code` is one), 1 if not named. Without factors each language keeps its share of the text:
    scores and clusters only move weight between documents of one language."""
    least: float = 0.25
    """Lower bound of a weight, in (0, 1]: above 0, so that no document that passed the filters is lost."""
    most: float = 4.0
    """Upper bound of a weight, at least 1: more than about four repetitions add little (arXiv 2305.16264)."""

    def __post_init__(self) -> None:
        for field in ("cluster_exponent", "score_strength"):
            value = getattr(self, field)
            require(0 <= value <= 10, f"weights.{field}", value, "it must be in 0..10")
        require(0 < self.least <= 1, "weights.least", self.least, "it must be in (0, 1]")
        require(1 <= self.most < np.inf, "weights.most", self.most, "it must be at least 1")
        for field in ("sources", "languages"):
            for name, factor in getattr(self, field).items():
                require(0 < factor < np.inf, f"weights.{field}[{name!r}]", factor, "it must be positive")


def sampling_weights(
    cluster_sizes: np.ndarray,
    clusters: np.ndarray,
    scores: np.ndarray,
    sources: Sequence[str] | np.ndarray,
    config: WeightsConfig | None = None,
    *,
    languages: Sequence[str] | np.ndarray | None = None,
    sizes: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [n] > 0: how often to sample each document for one pass over the corpus.

        w = source * (cluster size / median size)^-cluster_exponent * exp(score_strength * (2 q - 1))
        weight = min(max(s w, least), most)

    q in 0..1 is the rank of the document's score in its language; equal scores share a rank. Ranks are used because
    scores have no scale, within a language because rules and models treat languages differently. The cluster's size
    lowers the weight because copies too different to be removed gather in large clusters. s makes the mean weight of
    each language over `sizes` (int [n], bytes or tokens; by default all documents count equally) 1, or what
    config.languages and config.sources ask for while the mean of all documents stays 1. So a budget of tokens is spent
    as planned, and a longer training run multiplies all weights. `cluster_sizes` [k] are in documents or bytes,
    `clusters` int [n] index them. Without `languages` all documents have one language.

    Raises ValueError if lengths differ, a cluster, size or score is not valid, or the config names an unknown source or
    language.
    """
    config = config or WeightsConfig()
    n = len(clusters)
    languages = np.asarray([""] * n if languages is None else languages, dtype=str)
    sources = np.asarray(sources, dtype=str)
    sizes = np.ones(n) if sizes is None else sizes.astype(np.float64)
    arrays = (("scores", scores), ("sources", sources), ("languages", languages), ("sizes", sizes))
    for name, array in arrays:
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

    asked = _factors("sources", sources, config.sources)
    relative = cluster_sizes / np.median(cluster_sizes[cluster_sizes > 0])
    groups, group = np.unique(languages, return_inverse=True)
    # The mean weight that each language asks for: its factor times those of its sources.
    by_size = np.bincount(group, sizes)
    means = np.bincount(group, sizes * asked * _factors("languages", languages, config.languages))
    means = _scaled(means[by_size > 0] / by_size[by_size > 0], by_size[by_size > 0], config.least, config.most)
    mean_of = np.ones(len(groups))
    mean_of[by_size > 0] = means
    weights = np.empty(n)
    for number in range(len(groups)):
        here = group == number
        factors = asked[here] * relative[clusters[here]] ** -config.cluster_exponent
        factors *= np.exp(config.score_strength * (2 * _ranks(scores[here]) - 1))
        of_size = sizes[here] if by_size[number] else np.ones(len(factors))
        weights[here] = _scaled(factors, of_size, config.least, config.most, mean_of[number])
    return weights.astype(np.float32)


def _factors(field: str, values: np.ndarray, factors: dict[str, float]) -> np.ndarray:
    """The factor of each document by its source or language."""
    names, index = np.unique(values, return_inverse=True)
    for name in factors:
        legal = f"{field} of the documents are " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        require(name in names, f"weights.{field}", name, legal)
    return np.array([factors.get(str(name), 1.0) for name in names], np.float64)[index]


def _ranks(scores: np.ndarray) -> np.ndarray:
    """float64 [n] in 0..1: the share of documents with a lower score, plus half of the others with an equal score."""
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    if len(counts) == 1:
        return np.full(len(scores), 0.5)
    return ((below + (counts - 1) / 2) / (len(scores) - 1))[index]


def _scaled(factors: np.ndarray, sizes: np.ndarray, least: float, most: float, wanted: float = 1.0) -> np.ndarray:
    """min(max(s * factors, least), most) with mean `wanted` over `sizes`; s is found by bisection."""
    low, high = least / factors.max(), most / factors.min()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        mean = (np.clip(middle * factors, least, most) * sizes).sum() / sizes.sum()
        low, high = (middle, high) if mean < wanted else (low, middle)
    return np.clip(high * factors, least, most)
