"""What clusters are about, for people: size, quality, sources, the documents in the middle and their words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

# Words are counted in so many documents of a cluster, and so many characters of each.
_READ_DOCUMENTS = 8
_READ_CHARACTERS = 4000
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]+")
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclasses.dataclass(frozen=True)
class Topic:
    """A cluster."""

    cluster: int
    documents: int
    mean_score: float
    sources: tuple[tuple[str, float], ...]
    """The most frequent sources and their shares of the documents."""
    languages: tuple[tuple[str, float], ...]
    examples: tuple[int, ...]
    """The documents nearest to the centroid, nearest first."""
    words: tuple[str, ...]
    """Distinctive words of the documents nearest to the centroid; of Chinese, pairs of characters."""


def describe_clusters(
    clusters: np.ndarray,
    cosines: np.ndarray,
    scores: np.ndarray,
    sources: Sequence[str] | np.ndarray,
    languages: Sequence[str] | np.ndarray,
    read: Callable[[Sequence[int]], Sequence[str]],
    *,
    count: int = 20,
    examples: int = 3,
    words: int = 8,
) -> list[Topic]:
    """The `count` largest clusters, largest first.

    `clusters` int [n] and `cosines` float [n] are the nearest centroid of each document (`clustering.assign`). `read`
    gives the texts of some documents; it is called once, for at most max(8, examples) documents a cluster.
    A word's weight is its number of documents times log(clusters / clusters with it), both among those read.
    """
    sizes = np.bincount(clusters) if len(clusters) else np.empty(0, np.int64)
    # At equal sizes the lower number comes first, at equal cosines the earlier document.
    largest = [int(c) for c in np.argsort(-sizes, kind="stable")[:count] if sizes[c]]
    order = np.lexsort((-cosines, clusters))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    members = [order[starts[c] : starts[c + 1]] for c in largest]
    middles = [[int(d) for d in documents[: max(_READ_DOCUMENTS, examples)]] for documents in members]
    texts = iter(read([document for middle in middles for document in middle]))
    counts = [Counter(word for _ in middle for word in set(_words(next(texts)))) for middle in middles]
    occurs = Counter(word for counter in counts for word in counter)
    sources, languages = np.asarray(sources, dtype=str), np.asarray(languages, dtype=str)
    return [
        Topic(
            cluster=cluster,
            documents=len(documents),
            mean_score=float(np.mean(scores[documents], dtype=np.float64)),
            sources=_shares(sources[documents]),
            languages=_shares(languages[documents]),
            examples=tuple(middle[:examples]),
            words=tuple(_distinctive(counter, occurs, len(largest))[:words]),
        )
        for cluster, documents, middle, counter in zip(largest, members, middles, counts, strict=True)
    ]


def _shares(names: np.ndarray) -> tuple[tuple[str, float], ...]:
    values, counts = np.unique(names, return_counts=True)
    return tuple((str(values[i]), float(counts[i] / len(names))) for i in np.argsort(-counts, kind="stable")[:3])


def _words(text: str) -> Iterator[str]:
    text = text[:_READ_CHARACTERS]
    for run in _HAN.findall(text):
        yield from (run[i : i + 2] for i in range(len(run) - 1))
    yield from (word.lower() for word in _WORD.findall(_HAN.sub(" ", text)))


def _distinctive(counts: Counter[str], occurs: Counter[str], clusters: int) -> list[str]:
    weights = {word: n * math.log((clusters + 1) / occurs[word]) for word, n in counts.items() if n > 1}
    return sorted(weights, key=lambda word: (-weights[word], word))
