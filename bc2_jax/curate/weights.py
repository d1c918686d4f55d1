"""Sampling weights of documents by cluster size, quality, source and language (paper section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from bc2_jax.validation import require

# Bisections until float64 has no number between the ends of the interval.
_HALVINGS = 200
# Documents of a corpus whose scores and factors are counted exactly, and the last bits left out in a larger one
# (float64 has 52 after the point).
_EXACT, _DROPPED_BITS = 1 << 22, 52 - 14


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


def count_scores(
    languages: np.ndarray, sources: np.ndarray, scores: np.ndarray, sizes: np.ndarray, corpus: int
) -> pa.Table:
    """(language, source, value, documents, size) for each language, source and score of some documents.

    `scores` float [n], `sizes` int [n] in bytes or tokens. `corpus` is the number of documents of all parts: beyond 4
    million, scores that agree in their first 15 binary digits count as equal, so that the table stays small. Raises
    ValueError if lengths differ, a score is not finite or a size is negative.
    """
    n = len(sources)
    for name, array in (("languages", languages), ("scores", scores), ("sizes", sizes)):
        require(len(array) == n, name, array.shape, f"there are {n} documents")
    require(bool(np.isfinite(scores).all()), "scores", scores[~np.isfinite(scores)][:1].tolist(), "they must be finite")
    require(bool((sizes >= 0).all()), "sizes", sizes[sizes < 0][:1].tolist(), "they must be at least 0")
    return _counts({"language": languages, "source": sources, "value": _coarse(scores, corpus)}, sizes)


def count_factors(languages: np.ndarray, factors: np.ndarray, sizes: np.ndarray) -> pa.Table:
    """(language, value, documents, size) for each language and result of `Weigher.factors` of some documents."""
    return _counts({"language": languages, "value": factors}, sizes)


def add_counts(tables: Sequence[pa.Table]) -> pa.Table:
    """The table of all documents from those of its parts (at least one). All numbers are integers: any parts add up to
    the same table."""
    keys = [name for name in tables[0].column_names if name not in ("documents", "size")]
    sums = pa.concat_tables(tables).group_by(keys).aggregate([("documents", "sum"), ("size", "sum")])
    sums = sums.rename_columns([*keys, "documents", "size"])
    return sums.sort_by([(name, "ascending") for name in keys]).combine_chunks()


def _counts(keys: dict[str, np.ndarray], sizes: np.ndarray) -> pa.Table:
    # The types are named, because a part of the corpus may be empty.
    types = {name: pa.float64() if name == "value" else pa.string() for name in keys}
    columns = {name: pa.array(values, types[name]) for name, values in keys.items()}
    numbers = {"documents": np.ones(len(sizes), np.int64), "size": sizes.astype(np.int64)}
    return add_counts([pa.table(columns | numbers)])


def _coarse(values: np.ndarray, corpus: int) -> np.ndarray:
    """float64 `values`, of a large corpus without the last bits of their mantissa; keeps their order."""
    values = np.asarray(values, np.float64) + 0.0  # there is one zero
    if corpus <= _EXACT:
        return values
    return (values.view(np.uint64) >> np.uint64(_DROPPED_BITS) << np.uint64(_DROPPED_BITS)).view(np.float64)


class Weigher:
    """How often to sample each document for one pass over the corpus.

        w = source * (cluster size / median size)^-cluster_exponent * exp(score_strength * (2 q - 1))
        weight = min(max(s w, least), most)

    q in 0..1 is the rank of the document's score in its language; equal scores share a rank. Ranks are used because
    scores have no scale, within a language because rules and models treat languages differently. The cluster's size
    lowers the weight because copies too different to be removed gather in large clusters. s makes the mean weight of
    each language over its sizes 1 (over its documents if they have no size), or what config.languages and
    config.sources ask for while the mean of all documents stays 1. So a budget of tokens is spent as planned, and a
    longer training run multiplies all weights.

    `scored` is the sum of `count_scores` over all documents, with the same `corpus`; `cluster_sizes` int [k] are in
    documents or bytes. A task gets w of its documents by `factors`; their `count_factors`, added up, give s of each
    language by `scales`; with both come the `scaled_weights`. Raises ValueError if all sizes are 0 or the config names
    an unknown source or language.
    """

    def __init__(self, scored: pa.Table, cluster_sizes: np.ndarray, corpus: int, config: WeightsConfig) -> None:
        self.config, self._corpus = config, corpus
        languages, group = _unique(scored["language"])
        sources, source = _unique(scored["source"])
        sizes, documents, values = (scored[name].to_numpy() for name in ("size", "documents", "value"))
        require(bool(sizes.any()), "sizes", 0, "one must be above 0")
        self._sources = _factors("sources", sources, config.sources)
        of_language = _factors("languages", languages, config.languages)
        self._relative = cluster_sizes / np.median(cluster_sizes[cluster_sizes > 0])
        self._ranks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for number, name in enumerate(languages):
            here = group == number
            self._ranks[name] = _ranks(values[here], documents[here])
        # The mean weight that each language asks for: its factor times those of its sources.
        by_size = np.bincount(group, sizes)
        asked = np.array([self._sources[name] for name in sources])[source]
        means = np.bincount(group, sizes * asked * np.array([of_language[name] for name in languages])[group])
        means = _scaled(means[by_size > 0] / by_size[by_size > 0], by_size[by_size > 0], config.least, config.most)
        every = np.ones(len(languages))
        every[by_size > 0] = means
        self._means = dict(zip(languages, every.tolist(), strict=True))

    def factors(
        self, clusters: np.ndarray, scores: np.ndarray, sources: np.ndarray, languages: np.ndarray
    ) -> np.ndarray:
        """float64 [n]: w of some of the documents. `clusters` int [n] index `cluster_sizes`.

        Raises ValueError for a cluster that is unknown or has no size.
        """
        legal = f"they must be in 0..{len(self._relative) - 1} and have a size above 0"
        known = (clusters >= 0) & (clusters < len(self._relative))
        known[known] = self._relative[clusters[known]] > 0
        require(bool(known.all()), "clusters", clusters[~known][:1].tolist(), legal)
        factors, scores = np.empty(len(clusters)), _coarse(scores, self._corpus)
        names, source = _unique(sources)
        asked = np.array([self._sources[name] for name in names])[source]
        for name, here in _by_name(languages):
            values, ranks = self._ranks[name]
            q = ranks[np.searchsorted(values, scores[here])]
            factors[here] = asked[here] * self._relative[clusters[here]] ** -self.config.cluster_exponent
            factors[here] *= np.exp(self.config.score_strength * (2 * q - 1))
        return _coarse(factors, self._corpus)

    def scales(self, counted: pa.Table) -> dict[str, float]:
        """s of each language, from the sum of `count_factors` over all documents."""
        languages, group = _unique(counted["language"])
        found = {}
        for number, name in enumerate(languages):
            part = counted.filter(pa.array(group == number))
            factors, sizes = part["value"].to_numpy(), part["size"].to_numpy()
            sizes = sizes if sizes.any() else part["documents"].to_numpy()
            found[name] = _scale(factors, sizes, self.config.least, self.config.most, self._means[name])
        return found


def scaled_weights(
    languages: np.ndarray, factors: np.ndarray, scales: dict[str, float], config: WeightsConfig
) -> np.ndarray:
    """float32 [n]: the weights of documents, from their `Weigher.factors` and the `Weigher.scales` of all."""
    weights = np.empty(len(factors), np.float32)
    for name, here in _by_name(languages):
        weights[here] = np.clip(scales[name] * factors[here], config.least, config.most)
    return weights


def _unique(names: Any) -> tuple[list[str], np.ndarray]:
    """Sorted names, and the index of each name among them."""
    found, index = np.unique(np.asarray(names).astype(str), return_inverse=True)
    return found.tolist(), index


def _by_name(names: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each name and where it is, bool [n]."""
    found, index = _unique(names)
    return ((name, index == number) for number, name in enumerate(found))


def _factors(field: str, names: list[str], factors: dict[str, float]) -> dict[str, float]:
    """The factor of each source or language of the documents."""
    for name in factors:
        legal = f"{field} of the documents are " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        require(name in names, f"weights.{field}", name, legal)
    return {name: factors.get(name, 1.0) for name in names}


def _ranks(scores: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sorted scores, their ranks in 0..1: the share of documents with a lower score, plus half of the others with an
    equal one) of scores and the numbers of documents that have them."""
    values, index = np.unique(scores, return_inverse=True)
    counts = np.bincount(index, documents)
    if len(counts) == 1:
        return values, np.array([0.5])
    below = np.cumsum(counts) - counts
    return values, (below + (counts - 1) / 2) / (counts.sum() - 1)


def _scale(factors: np.ndarray, sizes: np.ndarray, least: float, most: float, wanted: float) -> float:
    """s for which the mean of min(max(s * factors, least), most) over `sizes` is `wanted`, by bisection."""
    low, high = least / factors.max(), most / factors.min()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        mean = (np.clip(middle * factors, least, most) * sizes).sum() / sizes.sum()
        low, high = (middle, high) if mean < wanted else (low, middle)
    return float(high)


def _scaled(factors: np.ndarray, sizes: np.ndarray, least: float, most: float) -> np.ndarray:
    """min(max(s * factors, least), most) with mean 1 over `sizes`."""
    return np.clip(_scale(factors, sizes, least, most, 1.0) * factors, least, most)
