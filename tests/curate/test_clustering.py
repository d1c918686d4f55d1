"""Spherical k-means against plain numpy, on one device and on eight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.curate import clustering
from bc2_jax.curate.clustering import assign, fit
from bc2_jax.curate.config import ClusterConfig
from bc2_jax.curate.features import unit_rows


def blobs(rng: np.random.Generator, centers: int, points: int, dim: int = 64, spread: float = 0.05) -> tuple:
    """float16 [points, dim], and the center that each point is near."""
    labels = rng.integers(0, centers, points)
    return unit_rows(rng.standard_normal((centers, dim))[labels] + spread * rng.standard_normal((points, dim))), labels


def numpy_fit(points: np.ndarray, config: ClusterConfig) -> np.ndarray:
    """The same algorithm in fp64, point by point."""
    order = np.random.default_rng(config.seed).permutation(len(points))
    k, seeds = config.number(len(points)), list(order)
    sample = [points[i].astype(np.float64) for i in sorted(order[: config.sample])]
    centroids = np.array([points[i] for i in seeds[:k]], np.float64)
    seeds, old = seeds[k:] + seeds, None
    for _ in range(config.iterations):
        ids = [int(np.argmax(centroids @ point)) for point in sample]
        empty = 0
        for c in range(k):
            total = sum((p for p, i in zip(sample, ids, strict=True) if i == c), np.zeros(points.shape[1]))
            norm = np.sqrt((total**2).sum())
            if norm:
                centroids[c] = np.round(total / norm * 2048) / 2048
            else:
                centroids[c], empty = points[seeds.pop(0)], empty + 1
        moved = len(sample) if old is None else sum(a != b for a, b in zip(ids, old, strict=True))
        old = ids
        if moved < config.tolerance * len(sample) and not empty:
            break
    return centroids.astype(np.float16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_equals_numpy_on_any_mesh(mesh_of, seed: int, shape: tuple[int, int, int]):
    """Bit for bit: features are integers times a step."""
    rng = np.random.default_rng(seed)
    points, _ = blobs(rng, 12, 700, spread=1.0)
    points[5] = 0
    config = ClusterConfig(clusters=16, sample=600, seed=seed, tolerance=0.02)
    mesh = mesh_of(*shape)
    centroids = fit(points, config, mesh)
    np.testing.assert_array_equal(centroids, numpy_fit(points, config))
    ids, cosines = assign(points, centroids, 2, mesh)
    exact = points.astype(np.float64) @ centroids.astype(np.float64).T
    order = np.argsort(-exact, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(cosines, np.take_along_axis(exact, order, axis=1))
    assert ids.dtype == np.int32 and cosines.dtype == np.float32


def test_several_chunks(mesh_of, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clustering, "_MOST_ROWS", 32)
    monkeypatch.setattr(clustering, "_FEWEST_ROWS", 32)
    points, _ = blobs(np.random.default_rng(0), 5, 300, spread=1.0)
    config = ClusterConfig(clusters=7)
    for mesh in (mesh_of(1, 1, 1), mesh_of(1, 4, 1)):
        centroids = fit(points, config, mesh)
        np.testing.assert_array_equal(centroids, numpy_fit(points, config))
        ids, _ = assign(points, centroids, mesh=mesh)
        np.testing.assert_array_equal(ids[:, 0], np.argmax(points.astype(float) @ centroids.T.astype(float), axis=1))


def test_finds_clusters_that_are_there():
    points, labels = blobs(np.random.default_rng(1), 8, 500)
    ids, cosines = assign(points, fit(points, ClusterConfig(clusters=32, iterations=20)))
    for cluster in np.unique(ids[:, 0]):
        assert len(np.unique(labels[ids[:, 0] == cluster])) == 1
    assert cosines.min() > 0.85


def test_an_empty_cluster_starts_again_at_another_point():
    """Two of the first centroids are equal, so one of them has no points."""
    config = ClusterConfig(clusters=3, iterations=10)
    order = np.random.default_rng(config.seed).permutation(30)
    points = np.zeros((30, 64), np.float16)
    points[np.arange(30), np.arange(30) % 3] = 1
    points[order[:3]] = points[order[0]]
    ids, cosines = assign(points, fit(points, config))
    assert len(np.unique(ids)) == 3 and (cosines == 1).all()


@settings(max_examples=8)
@given(st.integers(1, 6), st.integers(1, 9))
def test_few_points(points: int, clusters: int):
    features = np.eye(8, 64, dtype=np.float16)[:points]
    centroids = fit(features, ClusterConfig(clusters=clusters, tolerance=0.0))
    assert centroids.shape == (min(points, clusters), 64)
    ids, cosines = assign(features, centroids, 3)
    assert ids.shape == cosines.shape == (points, 3)
    found = min(points, clusters, 3)
    assert (ids[:, :found] >= 0).all() and (ids[:, found:] == -1).all() and np.isneginf(cosines[:, found:]).all()


@pytest.mark.parametrize(
    "documents, clusters", [(0, 1), (1, 1), (127, 1), (128, 1), (300, 2), (32_790, 256), (10**9, 4096)]
)
def test_number_of_clusters(documents: int, clusters: int):
    assert ClusterConfig().number(documents) == clusters


def test_wrong_input():
    for wrong in ({"clusters": -1}, {"sample": 0}, {"sample": 2**21}, {"tolerance": 1.0}, {"seed": -1}):
        (field,) = wrong
        with pytest.raises(ValueError, match=f"clusters.{field} = .* is not valid: it must be"):
            ClusterConfig(**wrong)
    points = np.eye(4, dtype=np.float16)
    for bad in (points.astype(np.float32), points[0], points[:0]):
        with pytest.raises(ValueError, match="points = .* is not valid"):
            fit(bad, ClusterConfig())
    with pytest.raises(ValueError, match="centroids = .* points have 4 columns"):
        assign(points, points[:, :3])
    with pytest.raises(ValueError, match="top = 0 is not valid"):
        assign(points, points, 0)
