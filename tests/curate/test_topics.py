"""Clusters as people read them."""

from __future__ import annotations

import numpy as np
import pytest

from bc2_jax.curate.topics import describe_clusters

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
SOURCES = ["web", "web", "books", "wiki", "wiki", "code", "web"]
LANGUAGES = ["en", "en", "en", "zh", "zh", "code", "en"]


def test_largest_clusters():
    asked: list[list[int]] = []

    def read(documents):
        asked.append(list(documents))
        return [TEXTS[d] for d in documents]

    topics = describe_clusters(CLUSTERS, COSINES, SCORES, SOURCES, LANGUAGES, read, count=2, examples=2)
    assert [topic.cluster for topic in topics] == [2, 0] and [topic.documents for topic in topics] == [4, 2]
    assert [topic.mean_score for topic in topics] == [2, 5]
    assert topics[0].sources == (("web", 0.75), ("books", 0.25)) and topics[1].languages == (("zh", 1.0),)
    assert topics[0].examples == (1, 2) and topics[1].examples == (4, 3)
    assert topics[0].words == ("apple", "pie") and topics[1].words == ("器学", "学习", "机器")
    assert asked == [[1, 2, 0, 6, 4, 3]], "texts are read once, nearest first"


def test_words_of_every_cluster_do_not_distinguish():
    texts = ["common alpha", "common alpha", "common gamma", "common gamma"]
    topics = describe_clusters(
        np.array([0, 0, 1, 1]), np.ones(4), np.ones(4), ["s"] * 4, ["en"] * 4, lambda d: [texts[i] for i in d], words=1
    )
    assert [topic.words for topic in topics] == [("alpha",), ("gamma",)]


@pytest.mark.parametrize("count, expected", [(0, 0), (1, 1), (20, 3)])
def test_count(count: int, expected: int):
    topics = describe_clusters(CLUSTERS, COSINES, SCORES, SOURCES, LANGUAGES, lambda d: [""] * len(d), count=count)
    assert len(topics) == expected
    assert not describe_clusters(CLUSTERS[:0], COSINES[:0], SCORES[:0], [], [], lambda d: [], count=count)
