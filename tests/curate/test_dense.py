"""Pairs near in feature space against all pairs in fp64, and planted copies."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate import dense_pairs
from bc2_jax.curate.clustering import assign, fit
from bc2_jax.curate.config import ClusterConfig, DenseConfig
from bc2_jax.curate.dense_pairs import Pairs, near_duplicates
from bc2_jax.curate.features import DocumentFrequencies, EmbeddingConfig, HashedNgrams, unit_rows
from bc2_jax.curate.tokens import hash_ngrams, hash_tokens


def all_pairs(features: np.ndarray, assignments: np.ndarray, threshold: float) -> dict[tuple[int, int], float]:
    exact = features.astype(np.float64) @ features.astype(np.float64).T
    clusters = [set(row) - {-1} for row in assignments.tolist()]
    return {
        (i, j): exact[i, j]
        for j in range(len(features))
        for i in range(j)
        if clusters[i] & clusters[j] and exact[i, j] >= threshold
    }


def as_dict(pairs: Pairs) -> dict[tuple[int, int], float]:
    assert (pairs.first.dtype, pairs.second.dtype, pairs.cosine.dtype) == (np.int64, np.int64, np.float32)
    found = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert found == sorted(set(found))
    return dict(zip(found, pairs.cosine.tolist(), strict=True))


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 3), st.integers(1, 50), st.floats(0.05, 1))
def test_equals_all_pairs(seed: int, documents: int, top: int, block: int, threshold: float):
    rng = np.random.default_rng(seed)
    features = unit_rows(rng.standard_normal((documents, 4)))
    features[rng.random(documents) < 0.1] = 0
    assignments = np.argsort(rng.random((documents, 6)))[:, :top].astype(np.int32) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_pairs, "_BLOCK", block)
        patch.setattr(dense_pairs, "_MOST_PAIRS", block)
        config = DenseConfig(cosine=threshold, clusters_per_document=top, jaccard=0.0, most_earlier=documents + 1)
        every = near_duplicates(features, assignments, lambda i, j: np.zeros(len(i)), config)
        assert as_dict(every) == all_pairs(features, assignments, threshold)
        config = DenseConfig(cosine=threshold, clusters_per_document=2, jaccard=0.5, most_earlier=2)
        verified = near_duplicates(features, assignments, lambda i, j: (i * 7 + j) % 5 / 4, config)
    expected: dict[tuple[int, int], float] = {}
    for (i, j), cosine in all_pairs(features, assignments[:, :2], threshold).items():
        if (i * 7 + j) % 5 >= 2 and sum(second == j for _, second in expected) < 2:
            expected[i, j] = cosine
    assert as_dict(verified) == expected


def test_finds_copies_with_dense_edits(modules: list[str]):
    """6 % of the tokens changed; the verification is the exact Jaccard similarity of five-token shingles."""
    documents = [module[i : i + 2500] for module in modules for i in range(0, len(module), 2500)]
    rng = np.random.default_rng(0)
    vocabulary = sorted(set(re.findall(r"\w+", "".join(documents))))
    texts = list(documents)
    for text in documents[::3]:
        words = re.findall(r"\w+|\W+", text)
        for i in np.flatnonzero(rng.random(len(words)) < 0.06):
            words[i] = rng.choice(vocabulary) if words[i][0].isalnum() else words[i]
        texts.append("".join(words))
    planted = {(3 * i, len(documents) + i) for i in range(len(texts) - len(documents))}
    features = HashedNgrams(EmbeddingConfig(), DocumentFrequencies.of(texts)).sketch(hash_tokens(texts))
    ids, _ = assign(features, fit(features, ClusterConfig(documents_per_cluster=16)), 2)
    shingles = [set(hash_ngrams(hash_tokens([text]), 5).hashes.tolist()) for text in texts]

    def jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        pairs = [(shingles[i], shingles[j]) for i, j in zip(first, second, strict=True)]
        return np.array([len(a & b) / max(len(a | b), 1) for a, b in pairs])

    found = as_dict(near_duplicates(features, ids, jaccard, DenseConfig(jaccard=0.4)))
    assert len(planted & set(found)) >= 0.8 * len(planted)
    assert len(set(found) - planted) <= 0.05 * len(planted)


def test_wrong_input():
    for wrong in (
        {"clusters_per_document": 0},
        {"most_earlier": 0},
        {"cosine": 0.0},
        {"cosine": 1.1},
        {"jaccard": -0.1},
    ):
        (field,) = wrong
        with pytest.raises(ValueError, match=f"dense.{field} = .* is not valid: it must be"):
            DenseConfig(**wrong)
    features, ids = np.eye(3, dtype=np.float16), np.zeros((3, 2), np.int32)
    for arguments in ((features.astype(float), ids), (features, ids[:2]), (features, ids[:, 0])):
        with pytest.raises(ValueError, match="is not valid"):
            near_duplicates(*arguments, lambda i, j: i, DenseConfig())
