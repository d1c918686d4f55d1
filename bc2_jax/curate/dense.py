"""The dense stage (paper section 2.1): near copies by dense features, clusters of documents, sampling weights.

MinHash misses copies with many small edits: an edit breaks every shingle that it touches, so with 6 % of the tokens
changed a quarter of the 5-token shingles are gone, and few bands of MinHash rows still agree. The cosine of dense
features falls by a few percent only. It is coarse and nearly blind to order, so the signatures verify each candidate.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from bc2_jax.curate import clustering
from bc2_jax.curate.config import CurationConfig, DenseConfig
from bc2_jax.curate.copies import resolve
from bc2_jax.curate.engine import Engine, Result, Run, Runner, Stage
from bc2_jax.curate.features import check_features, mean_hidden_states, unit_rows
from bc2_jax.curate.filtering import model_state
from bc2_jax.curate.minhash import VALUES, similarity
from bc2_jax.curate.shards import binary_rows
from bc2_jax.curate.stages import decide, survivors
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.weights import sampling_weights
from bc2_jax.validation import require

_EARLIER = ("near", "contamination")
# Rows and columns of a block of cosines: 1 MB, and at most a quarter of a million pairs.
_BLOCK = 512
# Pairs verified at a time.
_MOST_PAIRS = 1 << 14


class DenseCopies(Stage):
    """Decides which documents are near copies by dense features; writes clusters and weights; describes clusters."""

    name = "dense"

    def settings(self, config: CurationConfig) -> Any:
        parts = {
            name: dataclasses.asdict(getattr(config, name)) for name in ("embedding", "clusters", "dense", "weights")
        }
        return [parts, model_state(config.embedding.model)]

    def run(self, runner: Runner) -> list[dict[str, Any]]:
        config, work = runner.config, runner.run.work
        features, dim = work / "filter" / "features", config.embedding.dim
        if config.embedding.model:
            embedded = runner.map(self._embed, runner.shards)
            features, dim = runner.folder / "features", embedded[0]["dim"]
        with tempfile.TemporaryDirectory() as temporary:
            documents = _Documents(work, features, dim, Path(temporary))
            placed, copies, topics = _group(documents, work, config, runner.engine)
        decide(copies, runner.table("filter/shards", ["doc", "id"]), runner.folder)
        (runner.folder / "placed").write_table("placed.parquet", placed)
        return topics

    def _embed(self, run: Run, name: str) -> Result:
        """Dense features of a shard by a model, of the documents that near copies and benchmarks left."""
        table = survivors(run, name, ["doc", "text"], _EARLIER)
        features = unit_rows(mean_hidden_states(table["text"].to_pylist(), run.config.embedding))
        columns = pa.table({"doc": table["doc"], "feature": binary_rows(features)})
        (run.work / self.name / "features").write_table(f"{name}.parquet", columns)
        return {"dim": features.shape[1]}


class _Documents:
    """The documents that are compared: arrays of equal length in the order of their numbers.

    Features and signatures are mapped files in a temporary folder, so they may be larger than memory.
    """

    def __init__(self, work: Folder, vectors: Folder, dim: int, temporary: Path) -> None:
        folder = work / "filter" / "features"
        names = folder.names(".parquet")
        columns = ["doc", "source", "language", "score", "bytes"]
        decisions = [(work / stage / "decisions").select(None, ["doc"])["doc"].to_numpy() for stage in _EARLIER]
        dropped = np.concatenate(decisions)
        keep, tables = [], []
        for name in names:
            table = folder.read_table(name, columns)
            keep.append(pa.array(~np.isin(table["doc"].to_numpy(), dropped)))
            tables.append(table.filter(keep[-1]))
        self.table = pa.concat_tables(tables).combine_chunks()
        rows = self.table.num_rows
        self.docs = self.table["doc"].to_numpy()
        self.features = _mapped(temporary / "features", (rows, dim), np.float16)
        self.signatures = _mapped(temporary / "signatures", (rows, VALUES), np.uint32)
        start = 0
        for name, kept in zip(names, keep, strict=True):
            signature = folder.read_table(name, ["signature"]).filter(kept)["signature"]
            # A model's features are only those of the documents that are left.
            feature = vectors.read_table(name, ["feature"])["feature"]
            feature = feature if len(feature) == len(signature) else feature.filter(kept)
            stop = start + len(signature)
            self.features[start:stop] = _rows(feature, np.float16, dim)
            self.signatures[start:stop] = _rows(signature, np.uint32, VALUES)
            start = stop


def _group(documents: _Documents, work: Folder, config: CurationConfig, engine: Engine) -> tuple[pa.Table, Any, list]:
    """(placed (doc, cluster, weight) of the documents that stay, copies (doc, first, similarity) or None, topics)."""
    docs = documents.docs
    if not len(docs):
        empty = {"doc": docs, "cluster": np.empty(0, np.int64), "weight": np.empty(0, np.float32)}
        return pa.table(empty), None, []
    centroids = clustering.fit(documents.features, config.clusters)
    nearest, cosines = clustering.assign(documents.features, centroids, config.dense.clusters_per_document)
    copies, stays = None, np.ones(len(docs), bool)
    if config.dense.enabled:
        copies = _find_copies(documents, nearest, config.dense, engine)
        stays = ~np.isin(docs, np.array(copies.select("doc").to_pydict()["doc"], np.int64))
    kept, clusters = documents.table.filter(pa.array(stays)), nearest[stays, 0]
    scores, sources, languages = (kept[name].to_numpy() for name in ("score", "source", "language"))
    weights = sampling_weights(
        np.bincount(clusters, minlength=len(centroids)), clusters, scores, sources, config.weights,
        languages=languages, sizes=kept["bytes"].to_numpy(),
    )  # fmt: skip
    placed = pa.table({"doc": docs[stays], "cluster": clusters.astype(np.int64), "weight": weights})

    def read(rows: Sequence[int]) -> list[str]:
        return _texts(work / "filter" / "shards", docs[stays][list(rows)])

    return placed, copies, clustering.describe_clusters(clusters, cosines[stays, 0], scores, sources, languages, read)


def _find_copies(documents: _Documents, nearest: np.ndarray, config: DenseConfig, engine: Engine) -> Any:
    """The near copies (doc, first, similarity) as a dataframe."""
    import daft

    docs, signatures = documents.docs, documents.signatures

    def jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return similarity(signatures[first], signatures[second])

    pairs = near_duplicates(documents.features, nearest, jaccard, config)
    edges = daft.from_pydict({"a": docs[pairs.second], "b": docs[pairs.first]})
    known = np.unique(np.concatenate([pairs.first, pairs.second]))
    blobs = pa.array([signatures[i].tobytes() for i in known], pa.binary())
    signature_of = daft.from_pydict({"doc": docs[known], "signature": blobs})
    return resolve(edges, signature_of, config.jaccard, engine)


def _mapped(path: Path, shape: tuple[int, int], dtype: Any) -> np.ndarray:
    if not shape[0]:
        return np.empty(shape, dtype)
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    path.unlink()  # the mapping stays; no file is left by a process that is killed
    return array


def _rows(column: pa.ChunkedArray, dtype: Any, width: int) -> np.ndarray:
    """Rows of a fixed-size binary column."""
    parts: list[np.ndarray] = [np.empty((0, width), dtype)]
    for chunk in column.chunks:
        rows: np.ndarray = np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, width)
        parts.append(rows[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def _texts(shards: Folder, documents: np.ndarray) -> list[str]:
    """The texts of some documents by their numbers."""
    rows = shards.select(ds.field("doc").isin(documents.tolist()), ["doc", "text"])
    found = dict(zip(rows["doc"].to_pylist(), rows["text"].to_pylist(), strict=True))
    return [found[document] for document in documents.tolist()]


class Pairs(NamedTuple):
    """Pairs of documents, each once, ordered by first, then by second."""

    first: np.ndarray
    """int64 [P]."""
    second: np.ndarray
    """int64 [P], greater than `first`."""
    cosine: np.ndarray
    """float32 [P]."""


def near_duplicates(
    features: np.ndarray,
    assignments: np.ndarray,
    jaccard: Callable[[np.ndarray, np.ndarray], np.ndarray],
    config: DenseConfig,
) -> Pairs:
    """Pairs of documents in a common cluster with at least the cosine and the Jaccard similarity of `config`.

    `features` float16 [n, dim] are rows of `features.unit_rows`, whose cosines are exact; `assignments` int32
    [n, top] are the nearest clusters of each document (`clustering.assign`; -1 is none). `jaccard` takes two int64
    [p], documents, and gives float [p], for example the share of equal values of their MinHash signatures. Of each
    document's earlier near-duplicates the first `config.most_earlier` are kept. Pairs are verified block by block, so
    memory beside the result is the features of one cluster and some 50 MB. Time grows with the square of the sizes of
    the clusters. Raises ValueError if the arrays do not fit together.
    """

    def verified() -> Iterator[Pairs]:
        for pairs in _candidates(features, assignments[:, : config.clusters_per_document], config.cosine):
            parts = range(0, len(pairs.first), _MOST_PAIRS)
            similar = [jaccard(*(x[i : i + _MOST_PAIRS] for x in pairs[:2])) >= config.jaccard for i in parts]
            if similar:
                yield _earliest(_take(pairs, np.concatenate(similar)), config.most_earlier)

    check_features(features, "features")
    shape = assignments.shape
    require(len(shape) == 2 and shape[0] == len(features), "assignments", shape, f"it must be [{len(features)}, top]")
    return _earliest(_collect(verified(), len(features)), config.most_earlier)


def _candidates(features: np.ndarray, assignments: np.ndarray, threshold: float) -> Iterator[Pairs]:
    """Pairs in a common cluster with a cosine of at least `threshold`, in blocks; a pair may come twice."""
    clusters = assignments.ravel()
    order = np.argsort(clusters, kind="stable")
    order = order[np.searchsorted(clusters[order], 0) :]
    for group in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
        members = group // max(assignments.shape[1], 1)  # ascending, as the sort is stable
        blocks = [_padded(features[members[i : i + _BLOCK]]) for i in range(0, len(members), _BLOCK)]
        for top, rows in enumerate(blocks):
            for left, columns in enumerate(blocks[top:], top):
                found = np.asarray(_block_cosines(rows, columns))
                i, j = np.nonzero(found >= threshold)
                first, second = members[i + top * _BLOCK], members[j + left * _BLOCK]
                yield _take(Pairs(first, second, found[i, j]), first < second)


# XLA, because the threads of a BLAS slow each other down where other threads use the cores too.
_block_cosines = jax.jit(clustering.exact_cosines)


def _padded(rows: np.ndarray) -> np.ndarray:
    """Zero rows added to a whole block, so that one program serves all; they are in no pair: thresholds are above 0."""
    block = np.zeros((_BLOCK, rows.shape[1]), rows.dtype)
    block[: len(rows)] = rows
    return block


def _take(pairs: Pairs, which: np.ndarray) -> Pairs:
    return Pairs(*(array[which] for array in pairs))


def _earliest(pairs: Pairs, count: int) -> Pairs:
    """Of pairs ordered by first, the first `count` of each second, in the same order."""
    order = np.argsort(pairs.second, kind="stable")
    starts = np.flatnonzero(np.diff(pairs.second[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return _take(pairs, np.sort(order[rank < count]))


def _collect(blocks: Iterator[Pairs], documents: int) -> Pairs:
    """All pairs in one, each once."""
    empty = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    pairs = Pairs(*(np.concatenate(arrays) for arrays in zip(empty, *blocks, strict=True)))
    return _take(pairs, np.unique(pairs.first * documents + pairs.second, return_index=True)[1])
