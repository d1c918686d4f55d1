"""The dense stage (paper section 2.1): near copies by dense features, clusters of documents, sampling weights.

MinHash misses copies with many small edits: an edit breaks every shingle that it touches, so with 6 % of the tokens
changed a quarter of the 5-token shingles are gone, and few bands of MinHash rows still agree. The cosine of dense
features falls by a few percent only. It is coarse and nearly blind to order, so the signatures verify each candidate.

Tasks find the nearest clusters of batches of shards and write features and signatures sorted by cluster; other tasks
compare the documents of some clusters. This process holds a few numbers a document: for the fit a sample of features,
for weights and descriptions cluster, score, source, language and size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from bc2_jax.curate import clustering
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.copies import resolve
from bc2_jax.curate.dense_pairs import near_duplicates
from bc2_jax.curate.engine import Result, Run, Runner, Stage
from bc2_jax.curate.features import mean_hidden_states, unit_rows
from bc2_jax.curate.filtering import model_state
from bc2_jax.curate.minhash import similarity
from bc2_jax.curate.shards import binary_rows
from bc2_jax.curate.stages import decide, survivors
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.weights import sampling_weights

if TYPE_CHECKING:
    from daft import DataFrame

_EARLIER = ("near", "contamination")
# Documents whose clusters one task finds: few files, because each task that compares reads from all of them.
_FEWEST_BATCH, _MOST_BATCH, _BATCHES = 1 << 12, 1 << 20, 256
# Documents that one task compares, unless one cluster has more; a larger cluster is compared in parts.
_FEWEST_COMPARED, _GROUPS, _MOST_COMPARED = 1 << 13, 4096, 1 << 17
_MEMBER_ROWS = 1024


class DenseCopies(Stage):
    """Decides which documents are near copies by dense features; writes clusters and weights; describes clusters."""

    name = "dense"

    def settings(self, config: CurationConfig) -> Any:
        parts = {
            name: dataclasses.asdict(getattr(config, name)) for name in ("embedding", "clusters", "dense", "weights")
        }
        return [parts, model_state(config.embedding.model)]

    def run(self, runner: Runner) -> list[dict[str, Any]]:
        config = runner.config
        vectors, dim = "filter/features", config.embedding.dim
        if config.embedding.model:
            embedded = runner.map(self._embed, runner.shards)
            vectors, dim = "dense/features", embedded[0]["dim"]
        tables = _documents(runner)
        documents = pa.concat_tables(tables.values()).combine_chunks()
        docs, copies = documents["doc"].to_numpy(), None
        topics: list[dict[str, Any]] = []
        empty = {"doc": docs, "cluster": np.empty(0, np.int64), "weight": np.empty(0, np.float32)}
        if len(docs):
            centroids = clustering.fit(_Points(runner, vectors, docs, dim), config.clusters)
            nearest, cosines = _assign_all(runner, centroids, vectors, {name: len(t) for name, t in tables.items()})
            if config.dense.enabled:
                copies = _find_copies(runner, np.bincount(nearest[nearest >= 0]))
            placed, topics = _place(documents, nearest[:, 0], cosines, len(centroids), copies, runner.run)
        decide(copies, runner.table("filter/shards", ["doc", "id"]), runner.folder)
        (runner.folder / "placed").write_table("placed.parquet", placed if len(docs) else pa.table(empty))
        return topics

    def _embed(self, run: Run, name: str) -> Result:
        """Dense features of a shard by a model, of the documents that near copies and benchmarks left."""
        table = survivors(run, name, ["doc", "text"], _EARLIER)
        features = unit_rows(mean_hidden_states(table["text"].to_pylist(), run.config.embedding))
        columns = pa.table({"doc": table["doc"], "feature": binary_rows(features)})
        (run.work / self.name / "features").write_table(f"{name}.parquet", columns)
        return {"dim": features.shape[1]}


def _documents(runner: Runner) -> dict[str, pa.Table]:
    """Number, source, language, score and bytes of the documents that are compared, by shard, in order."""
    work = runner.run.work
    decisions = [(work / stage / "decisions").select(None, ["doc"])["doc"].to_numpy() for stage in _EARLIER]
    dropped, tables = np.concatenate(decisions), {}
    for file in (work / "filter" / "features").names(".parquet"):
        table = (work / "filter" / "features").read_table(file, ["doc", "source", "language", "score", "bytes"])
        tables[file.removesuffix(".parquet")] = table.filter(pa.array(~np.isin(table["doc"].to_numpy(), dropped)))
    return tables


class _Points:
    """The features of documents as rows of an array float16 [n, dim] that stays on disk."""

    ndim, dtype = 2, np.dtype(np.float16)

    def __init__(self, runner: Runner, folder: str, docs: np.ndarray, dim: int) -> None:
        self.shape: tuple[int, ...] = (len(docs), dim)
        self._runner, self._folder, self._docs = runner, folder, docs
        self._read_docs, self._read_rows = np.empty(0, np.int64), np.empty((0, dim), np.float16)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The features of some rows; those of the last reading are not read again."""
        import daft

        docs = self._docs[rows]
        if not np.isin(docs, self._read_docs).all():
            wanted = daft.from_pydict({"doc": np.unique(docs)})
            table = self._runner.table(self._folder, ["doc", "feature"]).join(wanted, on="doc").sort("doc").to_arrow()
            self._read_docs = table["doc"].to_numpy()
            self._read_rows = _rows(table["feature"].cast(pa.binary(2 * self.shape[1])), np.float16)
        return self._read_rows[np.searchsorted(self._read_docs, docs)]


def _assign_all(
    runner: Runner, centroids: np.ndarray, vectors: str, sizes: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(nearest clusters int32 [n, top], cosines float32 [n] of the first) of the documents of all shards, in order.

    `sizes` are the documents of each shard.
    """
    most = min(max(sum(sizes.values()) // _BATCHES, _FEWEST_BATCH), _MOST_BATCH)
    batches: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if size > left:
            batches.append([])
            left = most
        if size:
            batches[-1].append(name)
            left -= size
    names = [f"{number:06d}" for number in range(len(batches))]
    work = functools.partial(_assign, centroids, vectors, dict(zip(names, batches, strict=True)))
    runner.map(work, names, suffix="-assigned")
    tables = [(runner.folder / "assigned").read_table(f"{name}.parquet") for name in names]
    found = pa.concat_tables(tables)
    return _rows(found["clusters"], np.int32), found["cosine"].to_numpy()


def _assign(centroids: np.ndarray, vectors: str, batches: dict[str, list[str]], run: Run, name: str) -> Result:
    """Writes the nearest clusters of the documents of a batch of shards, and these documents sorted by cluster."""
    decisions = [(run.work / stage / "decisions").select(None, ["doc"])["doc"].to_numpy() for stage in _EARLIER]
    dropped, docs, features, signatures = np.concatenate(decisions), [], [], []
    for shard in batches[name]:
        table = (run.work / "filter" / "features").read_table(f"{shard}.parquet", ["doc", "signature"])
        table = table.filter(pa.array(~np.isin(table["doc"].to_numpy(), dropped)))
        # A model's features are only those of the documents that are left.
        feature = (run.work / vectors).read_table(f"{shard}.parquet", ["doc", "feature"])
        feature = feature.filter(pa.array(np.isin(feature["doc"].to_numpy(), table["doc"].to_numpy())))
        docs.append(table["doc"].to_numpy())
        signatures.append(_rows(table["signature"], np.uint32))
        features.append(_rows(feature["feature"], np.float16))
    doc_N, feature_ND, signature_NS = (np.concatenate(parts) for parts in (docs, features, signatures))
    config = run.config.dense
    nearest, cosines = clustering.assign(feature_ND, centroids, config.clusters_per_document)
    folder = run.work / DenseCopies.name
    columns = {"clusters": binary_rows(nearest), "cosine": cosines[:, 0]}
    (folder / "assigned").write_table(f"{name}.parquet", pa.table(columns))
    if config.enabled:
        keys = nearest.ravel()
        order = np.argsort(keys, kind="stable")[np.count_nonzero(keys < 0) :]
        rows = order // nearest.shape[1]  # ascending in each cluster, as the sort is stable
        members = {"key": keys[order].astype(np.int64), "doc": doc_N[rows]}
        members |= {"feature": binary_rows(feature_ND[rows]), "signature": binary_rows(signature_NS[rows])}
        (folder / "members").write_table(f"{name}.parquet", pa.table(members), rows=_MEMBER_ROWS)
    return {"documents": len(doc_N)}


def _find_copies(runner: Runner, sizes: np.ndarray) -> DataFrame:
    """The near copies (doc, first, similarity); `sizes` are the documents of each cluster."""
    from daft import Window, col, lit
    from daft.functions import row_number

    config = runner.config.dense
    runner.map(_compare, _plan(sizes), suffix="-pairs")
    # Two clusters of a document may have found the same pair.
    pairs = runner.table("dense/pairs", ["a", "b"]).distinct()
    ranked = pairs.with_column("rank", row_number().over(Window().partition_by("a").order_by("b")))
    edges = ranked.where(col("rank") <= lit(config.most_earlier)).select("a", "b")
    signatures = runner.table("filter/features", ["doc", "signature"])
    return resolve(edges, signatures, config.jaccard, runner.engine)


def _plan(sizes: np.ndarray) -> list[str]:
    """Names of the tasks that compare: FIRST-LAST-PART-PARTS, a range of clusters and a share of their blocks."""
    most = max(int(sizes.sum()) // _GROUPS, _FEWEST_COMPARED)
    names, first, held = [], 0, 0
    for cluster, size in enumerate(sizes.tolist()):
        if held and held + size > most:
            names.append((first, cluster - 1, held))
            first, held = cluster, 0
        held += size
    names.append((first, len(sizes) - 1, held))
    parts = [max(1, -(-held // _MOST_COMPARED)) for *_, held in names]
    return [
        f"{first:06d}-{last:06d}-{part:04d}-{count:04d}"
        for (first, last, _), count in zip(names, parts, strict=True)
        for part in range(count)
    ]


def _compare(run: Run, name: str) -> Result:
    """Writes the pairs (a, b), b < a, of near copies in the clusters of a task of `_plan`."""
    first, last, part, parts = map(int, name.split("-"))
    folder = run.work / DenseCopies.name
    in_task = (ds.field("key") >= first) & (ds.field("key") <= last)
    members = (folder / "members").select(in_task).sort_by([("key", "ascending"), ("doc", "ascending")])
    features, signatures = _rows(members["feature"], np.float16), _rows(members["signature"], np.uint32)

    def jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return similarity(signatures[one], signatures[other])

    clusters = members["key"].to_numpy().astype(np.int32)[:, None]
    pairs = near_duplicates(features, clusters, jaccard, run.config.dense, part, parts)
    docs = members["doc"].to_numpy()
    (folder / "pairs").write_table(f"{name}.parquet", pa.table({"a": docs[pairs.second], "b": docs[pairs.first]}))
    return {"pairs": len(pairs.first)}


def _place(
    documents: pa.Table, nearest: np.ndarray, cosines: np.ndarray, clusters: int, copies: DataFrame | None, run: Run
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """((doc, cluster, weight) of the documents that stay, descriptions of clusters)."""
    docs = documents["doc"].to_numpy()
    stays = np.ones(len(docs), bool)
    if copies is not None:
        stays = ~np.isin(docs, np.array(copies.select("doc").to_pydict()["doc"], np.int64))
    kept, cluster = documents.filter(pa.array(stays)), nearest[stays]
    scores, sources, languages = (kept[name].to_numpy() for name in ("score", "source", "language"))
    weights = sampling_weights(
        np.bincount(cluster, minlength=clusters), cluster, scores, sources, run.config.weights,
        languages=languages, sizes=kept["bytes"].to_numpy(),
    )  # fmt: skip

    def read(rows: Sequence[int]) -> list[str]:
        return _texts(run.work / "filter" / "shards", docs[stays][list(rows)])

    topics = clustering.describe_clusters(cluster, cosines[stays], scores, sources, languages, read)
    return pa.table({"doc": docs[stays], "cluster": cluster.astype(np.int64), "weight": weights}), topics


def _rows(column: pa.ChunkedArray, dtype: Any) -> np.ndarray:
    """The array [n, width] whose rows are the values of a fixed-size binary column."""
    width = column.type.byte_width // np.dtype(dtype).itemsize
    parts: list[np.ndarray] = [np.empty((0, width), dtype)]
    for chunk in column.chunks:
        rows = np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, width)
        parts.append(rows[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def _texts(shards: Folder, documents: np.ndarray) -> list[str]:
    """The texts of some documents by their numbers."""
    rows = shards.select(ds.field("doc").isin(documents.tolist()), ["doc", "text"])
    found = dict(zip(rows["doc"].to_pylist(), rows["text"].to_pylist(), strict=True))
    return [found[document] for document in documents.tolist()]
