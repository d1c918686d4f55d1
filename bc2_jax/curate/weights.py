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
    """Factor by source, 1 for those not named: above 1 up-samples reputable sites, and with them their languages."""
    languages: dict[str, float] = dataclasses.field(default_factory=dict)
    """Factor by language (`code` is one), 1 for those not named. Without factors each language keeps its share of the
    text: scores and clusters only move weight between documents of one language."""
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
    """float32 [n] > 0: how often each document should be read where the corpus as a whole is read once.

        w = source * (cluster size / median size)^-cluster_exponent * exp(score_strength * (2 q - 1))
        weight = min(max(s w, least), most)

    q in 0..1 is the rank of the document's score among those of its language, equal scores sharing one: ranks, and not
    scores, because a score has no scale, and within a language, because rules and models treat languages differently.
    A power of the size, because copies that are too different to be removed gather in large clusters, which are about
    what many wrote and not about what is worth more. s is such that the mean weight of each language over `sizes` (int
    [n], bytes or tokens; documents count equally by default) is 1, or as much more or less as config.languages and
    config.sources ask for while that of all documents stays 1: a budget of tokens is then spent as planned, and a
    longer training run multiplies all weights. Clusters are counted by `cluster_sizes` [k], in documents or bytes;
    `clusters` int [n] are theirs. Without `languages` there is one.

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
    # What each language gets for one of its bytes: its factor, and those of its sources.
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
    """In 0..1: the share of these documents with a lower score, and half of the others with an equal one."""
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    return (
        ((below + (counts - 1) / 2) / max(len(scores) - 1, 1))[index] if len(counts) > 1 else np.full(len(scores), 0.5)
    )


def _scaled(factors: np.ndarray, sizes: np.ndarray, least: float, most: float, wanted: float = 1.0) -> np.ndarray:
    """min(max(s * factors, least), most) whose mean over `sizes` is `wanted`. It rises with s: halve the interval."""
    low, high = least / factors.max(), most / factors.min()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        mean = (np.clip(middle * factors, least, most) * sizes).sum() / sizes.sum()
        low, high = (middle, high) if mean < wanted else (low, middle)
    return np.clip(high * factors, least, most)
