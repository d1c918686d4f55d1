"""Descriptions of clusters."""

from __future__ import annotations

import numpy as np
import pytest

from bc2_jax.curate import clustering
from bc2_jax.curate.clustering import describe_clusters, largest_clusters, members_of

TEXTS = [
    "apple pie apple",
    "apple cake",
    "apple tart and pie",
    "机器学习模型",
    "机器学习算法",
    "import numpy",
    "apple jam",
]
CLUSTERS = np.array([2, 2, 2, 0, 0, 5, 2])
COSINES = np.array([0.5, 0.9, 0.9, 0.7, 0.8, 0.3, 0.1])
SCORES = np.array([1, 2, 3, 4, 6, 7, 2], np.float32)
SOURCES = np.array(["web", "web", "books", "wiki", "wiki", "code", "web"])
LANGUAGES = np.array(["en", "en", "en", "zh", "zh", "code", "en"])


def described(clusters, cosines, scores, sources, languages, read, parts: int = 1):
    """The descriptions of a corpus in some parts."""
    chosen = largest_clusters(np.bincount(clusters))
    docs = np.arange(len(clusters))
    split = zip(*(np.array_split(x, parts) for x in (clusters, docs, cosines, scores, sources, languages)), strict=True)
    return describe_clusters(chosen, [members_of(chosen, *part) for part in split], read)


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_largest_clusters(parts: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clustering, "_DESCRIBED", 2)
    monkeypatch.setattr(clustering, "_EXAMPLES", 2)
    asked: list[list[int]] = []

    def read(documents):
        asked.append(list(documents))
        return [TEXTS[d] for d in documents]

    apple, study = described(CLUSTERS, COSINES, SCORES, SOURCES, LANGUAGES, read, parts)
    assert apple == {
        "cluster": 2, "documents": 4, "score": 2.0, "sources": ["web", "books"], "languages": ["en"],
        "words": ["apple", "pie"], "examples": [TEXTS[1], TEXTS[2]],
    }  # fmt: skip
    assert (study["cluster"], study["documents"], study["score"]) == (0, 2, 5.0)
    assert study["languages"] == ["zh"] and study["words"] == ["器学", "学习", "机器"]
    assert study["examples"] == [TEXTS[4], TEXTS[3]]
    assert asked == [[1, 2, 0, 6, 4, 3]], "texts are read once, nearest first"


def test_words_of_every_cluster_do_not_distinguish(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clustering, "_WORDS", 1)
    texts = ["common alpha", "common alpha", "common gamma", "common gamma"]
    names = np.array(["s"] * 4)
    topics = described(np.array([0, 0, 1, 1]), np.ones(4), np.ones(4), names, names, lambda d: [texts[i] for i in d])
    assert [topic["words"] for topic in topics] == [["alpha"], ["gamma"]]


@pytest.mark.parametrize("count, expected", [(0, 0), (1, 1), (20, 3)])
def test_count(count: int, expected: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clustering, "_DESCRIBED", count)
    topics = described(CLUSTERS, COSINES, SCORES, SOURCES, LANGUAGES, lambda d: [""] * len(d))
    assert len(topics) == expected
    none = (CLUSTERS[:0], COSINES[:0], SCORES[:0], SOURCES[:0], LANGUAGES[:0])
    assert not described(*none, lambda d: [])
