"""Clusters of documents by spherical k-means on a mesh, and what they are about (paper section 2.1).

Points are sharded over the devices as the rows of a batch are. Every device finds the nearest centroids of its own
points and sums them; one reduction an iteration gives all devices the sums. Features and centroids are multiples of
`features.STEP` and sums are integers, so any number of devices gives the same bits.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from bc2_jax.config import MeshConfig
from bc2_jax.curate.config import ClusterConfig
from bc2_jax.curate.features import STEP, check_features, unit_rows
from bc2_jax.sharding import make_mesh, mesh_axes, parts, spec
from bc2_jax.validation import require

# Points that a device takes at a time.
_MOST_ROWS = 8192
_FEWEST_ROWS = 256
# Clusters that are described, documents of each whose words are counted, and characters read of a document.
_DESCRIBED, _READ_DOCUMENTS, _READ_CHARACTERS = 20, 8, 4000
_WORDS, _EXAMPLES, _EXAMPLE_CHARACTERS, _NAMES = 8, 3, 80, 3
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]+")
_WORD = re.compile(r"[^\W\d_]{3,}")


class Points(Protocol):
    """An array [n, dim] or something whose rows are read like its rows."""

    shape: tuple[int, ...]
    ndim: int
    dtype: np.dtype

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


def fit(points: Points, config: ClusterConfig, mesh: Mesh | None = None) -> np.ndarray:
    """Centroids float16 [k, dim] of unit length of features float16 [n, dim] (rows of `features.unit_rows`).

    Rows are read by index, first a sample; the rows read later are usually in it. Starts from k random points; a
    cluster without points starts again at another one. `mesh` has devices of this process, by default all. Raises
    ValueError without points, or for points of another dtype or shape.
    """
    check_features(points, "points")
    require(len(points) > 0, "points", points.shape, "there must be at least one")
    order = np.random.default_rng(config.seed).permutation(len(points))
    # Reading in order is faster, and the sums do not depend on the order.
    sample = points[np.sort(order[: config.sample])]
    k = config.number(len(points))
    centroids = points[order[:k]]
    drawn = k
    old = np.full(len(sample), -1, np.int32)
    mesh = mesh or _default_mesh()
    with jax.set_mesh(mesh):
        rows = _chunk_rows(len(sample))
        chunks = [_place(sample[i : i + rows], rows, mesh) for i in range(0, len(sample), rows)]
        for _ in range(config.iterations):
            placed = jnp.asarray(centroids)
            # All chunks are dispatched before any is fetched, so that the devices do not wait for the host.
            ids_N = [_nearest(chunk, placed, 1)[0] for chunk in chunks]
            sums = [_sum_clusters(chunk, ids, k) for chunk, ids in zip(chunks, ids_N, strict=True)]
            new = np.concatenate(jax.device_get(ids_N))[: len(sample), 0]
            centroids = unit_rows(np.stack(jax.device_get(sums)).sum(axis=0, dtype=np.int64))
            empty = np.flatnonzero(~np.any(centroids, axis=1))
            centroids[empty] = points[order[(drawn + np.arange(len(empty))) % len(points)]]
            drawn += len(empty)
            moved, old = np.count_nonzero(new != old), new
            if moved < config.tolerance * len(sample) and not len(empty):
                break
    return centroids


def assign(
    points: np.ndarray, centroids: np.ndarray, top: int = 1, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` most similar centroids of each point, best first: ids int32 [n, top], cosines float32 [n, top].

    At equal cosines the lower id comes first. Memory on the devices does not grow with n. With fewer than `top`
    centroids the last columns are -1 and -inf.
    """
    check_features(points, "points")
    check_features(centroids, "centroids")
    require(
        centroids.shape[1] == points.shape[1], "centroids", centroids.shape, f"points have {points.shape[1]} columns"
    )
    require(top >= 1, "top", top, "it must be at least 1")
    ids, cosines = np.full((len(points), top), -1, np.int32), np.full((len(points), top), -np.inf, np.float32)
    found = min(top, len(centroids))
    mesh = mesh or _default_mesh()
    with jax.set_mesh(mesh):
        rows = _chunk_rows(len(points))
        placed = jnp.asarray(centroids)
        pending: list[tuple[int, tuple[Array, Array]]] = []
        # A chunk is fetched while the next one is computed.
        for start in range(0, len(points), rows):
            chunk = _place(points[start : start + rows], rows, mesh)
            pending.append((start, _nearest(chunk, placed, found)))
            if len(pending) > 1:
                _fetch(*pending.pop(0), ids, cosines)
        for start, result in pending:
            _fetch(start, result, ids, cosines)
    return ids, cosines


@functools.partial(jax.jit, static_argnames="top")
def _nearest(points_ND: Array, centroids_KD: Array, top: int) -> tuple[Array, Array]:
    def local(points_ND: Array, centroids_KD: Array) -> tuple[Array, Array]:
        cosines_NK = exact_cosines(points_ND, centroids_KD)
        ids, best = [], []
        # For a small `top` this is cheaper than a sort.
        for _ in range(top):
            id_N = jnp.argmax(cosines_NK, axis=1).astype(jnp.int32)
            ids.append(id_N)
            best.append(cosines_NK.max(axis=1))
            cosines_NK = jnp.where(id_N[:, None] == jnp.arange(len(centroids_KD)), -jnp.inf, cosines_NK)
        return jnp.stack(ids, axis=1), jnp.stack(best, axis=1)

    rows = spec("batch", None)
    return jax.shard_map(local, in_specs=(rows, spec()), out_specs=(rows, rows))(points_ND, centroids_KD)


@functools.partial(jax.jit, static_argnames="clusters")
def _sum_clusters(points_ND: Array, ids_N1: Array, clusters: int) -> Array:
    """int32 [K, D]: the sum of each cluster's points in units of STEP. Padding is zero and adds nothing.

    A separate program: XLA:CPU takes three times as long if the search for the nearest centroids is in it too.
    """

    def local(points_ND: Array, ids_N1: Array) -> Array:
        units_ND = (points_ND.astype(jnp.float32) / STEP).astype(jnp.int32)
        sums_KD = jax.ops.segment_sum(units_ND, ids_N1[:, 0], clusters)
        return jax.lax.psum(sums_KD, mesh_axes("batch"))

    rows = spec("batch", None)
    return jax.shard_map(local, in_specs=(rows, rows), out_specs=spec())(points_ND, ids_N1)


def exact_cosines(points_ND: Array, centroids_KD: Array) -> Array:
    """float32 [N, K] of float16 rows of `features.unit_rows`."""
    return jnp.einsum(
        "ND,KD->NK", points_ND.astype(jnp.float32), centroids_KD.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip


def _fetch(start: int, result: tuple[Array, Array], ids: np.ndarray, cosines: np.ndarray) -> None:
    for into, chunk in zip((ids, cosines), jax.device_get(result), strict=True):
        into = into[start : start + len(chunk), : chunk.shape[1]]
        into[:] = chunk[: len(into)]


def _default_mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.local_devices())


def _chunk_rows(points: int) -> int:
    """Rows of a chunk: one of few sizes, because each is compiled."""
    devices = parts("batch")
    rows = _FEWEST_ROWS
    while rows < _MOST_ROWS and rows * devices < points:
        rows *= 2
    return rows * devices


def _place(points: np.ndarray, rows: int, mesh: Mesh) -> Array:
    padded = np.zeros((rows, points.shape[1]), np.float16)
    padded[: len(points)] = points
    return jax.device_put(padded, NamedSharding(mesh, spec("batch", None)))


def largest_clusters(sizes: np.ndarray) -> list[int]:
    """The clusters to describe, largest first; of equal sizes the lower number comes first."""
    return [int(c) for c in np.argsort(-sizes, kind="stable")[:_DESCRIBED] if sizes[c]]


def members_of(
    chosen: Sequence[int],
    clusters: np.ndarray,
    docs: np.ndarray,
    cosines: np.ndarray,
    scores: np.ndarray,
    sources: np.ndarray,
    languages: np.ndarray,
) -> list[dict[str, Any]]:
    """What `describe_clusters` needs of the `chosen` clusters from a part of the corpus, as JSON, in their order.

    `clusters` int [n] and `cosines` float [n] are the nearest centroid of each document (`assign`), `docs` int [n]
    their numbers.
    """
    found = []
    for cluster in chosen:
        here = np.flatnonzero(clusters == cluster)
        nearest = here[np.lexsort((docs[here], -cosines[here]))[:_READ_DOCUMENTS]]
        found.append(
            {
                "documents": len(here),
                "score": float(np.sum(scores[here], dtype=np.float64)),
                "sources": Counter(sources[here].tolist()),
                "languages": Counter(languages[here].tolist()),
                "nearest": [[-float(cosines[i]), int(docs[i])] for i in nearest],
            }
        )
    return found


def describe_clusters(
    chosen: Sequence[int], parts: Sequence[list[dict[str, Any]]], read: Callable[[Sequence[int]], Sequence[str]]
) -> list[dict[str, Any]]:
    """The `chosen` clusters as JSON: sizes, mean scores, sources, languages, words and examples.

    `parts` are `members_of` of all parts of the corpus. `read` gives the texts of documents by their numbers; it is
    called once, for the documents nearest to the centroids, of equal ones the earlier. Words are the most distinctive
    ones of these documents (the number of documents times log(clusters / clusters with the word)), in Chinese pairs of
    characters. Examples are the beginnings of the nearest documents, nearest first.
    """
    members = [[part[place] for part in parts] for place in range(len(chosen))]
    nearest = [
        sorted(row for part in of_cluster for row in part["nearest"])[:_READ_DOCUMENTS] for of_cluster in members
    ]
    all_texts = iter(read([doc for rows in nearest for _, doc in rows]))
    texts = [[next(all_texts) for _ in rows] for rows in nearest]
    counts = [Counter(word for text in of_cluster for word in set(_words(text))) for of_cluster in texts]
    occurs = Counter(word for counter in counts for word in counter)
    return [
        {
            "cluster": cluster,
            "documents": (documents := sum(part["documents"] for part in of_cluster)),
            "score": round(math.fsum(part["score"] for part in of_cluster) / documents, 4),
            "sources": _most_frequent(part["sources"] for part in of_cluster),
            "languages": _most_frequent(part["languages"] for part in of_cluster),
            "words": _distinctive(counter, occurs, len(chosen))[:_WORDS],
            "examples": [text[:_EXAMPLE_CHARACTERS] for text in beginnings[:_EXAMPLES]],
        }
        for cluster, of_cluster, beginnings, counter in zip(chosen, members, texts, counts, strict=True)
    ]


def _most_frequent(parts: Iterable[dict[str, int]]) -> list[str]:
    """Names by their counts in all parts; of equally frequent ones the first in the alphabet comes first."""
    sums: Counter[str] = Counter()
    for part in parts:
        sums.update(part)
    return sorted(sums, key=lambda name: (-sums[name], name))[:_NAMES]


def _words(text: str) -> Iterator[str]:
    text = text[:_READ_CHARACTERS]
    for run in _HAN.findall(text):
        yield from (run[i : i + 2] for i in range(len(run) - 1))
    yield from (word.lower() for word in _WORD.findall(_HAN.sub(" ", text)))


def _distinctive(counts: Counter[str], occurs: Counter[str], clusters: int) -> list[str]:
    weights = {word: n * math.log((clusters + 1) / occurs[word]) for word, n in counts.items() if n > 1}
    return sorted(weights, key=lambda word: (-weights[word], word))
