"""The dense stage (paper section 2.1): near copies by dense features, clusters of documents, sampling weights.

MinHash misses copies with many small edits: an edit breaks every shingle that it touches, so with 6 % of the tokens
changed a quarter of the 5-token shingles are gone, and few bands of MinHash rows still agree. The cosine of dense
features falls by a few percent only. It is coarse and nearly blind to order, so the signatures verify each candidate.

Tasks find the nearest clusters of batches of shards and write features and signatures sorted by cluster; other tasks
compare the documents of some clusters. Weights take three passes of tasks over the batches: they count scores, then
what `weights.Weigher` makes of them, then write weights. This process fits clusters to a sample of features, for which
it draws 8 bytes a document, collects the copies and adds up counts.
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
from bc2_jax.curate.shards import binary_rows, replace_table
from bc2_jax.curate.stages import decide, survivors
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.weights import Weigher, add_counts, count_factors, count_scores, scaled_weights

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
        counts = runner.map(_count, runner.shards, suffix="-left")
        sizes = {name: count["documents"] for name, count in zip(runner.shards, counts, strict=True)}
        if not sum(sizes.values()):
            decide(None, runner.table("filter/shards", ["doc", "id"]), runner.folder)
            empty = {"doc": np.empty(0, np.int64), "cluster": np.empty(0, np.int64), "weight": np.empty(0, np.float32)}
            (runner.folder / "placed").write_table("placed.parquet", pa.table(empty))
            return []
        centroids = clustering.fit(_Points(runner, vectors, sizes, dim), config.clusters)
        batches = _batches(sizes)
        assigned = runner.map(
            functools.partial(_assign, centroids, vectors, batches), list(batches), suffix="-assigned"
        )
        copies = None
        if config.dense.enabled:
            copies = _find_copies(runner, _sum_counts(assigned, "members", len(centroids)))
        decide(copies, runner.table("filter/shards", ["doc", "id"]), runner.folder)
        return _place(runner, batches, len(centroids), sum(sizes.values()))

    def _embed(self, run: Run, name: str) -> Result:
        """Dense features of a shard by a model, of the documents that near copies and benchmarks left."""
        table = survivors(run, name, ["doc", "text"], _EARLIER)
        features = unit_rows(mean_hidden_states(table["text"].to_pylist(), run.config.embedding))
        columns = pa.table({"doc": table["doc"], "feature": binary_rows(features)})
        (run.work / self.name / "features").write_table(f"{name}.parquet", columns)
        return {"dim": features.shape[1]}


def _count(run: Run, name: str) -> Result:
    """The number of documents of a shard that are compared."""
    return {"documents": survivors(run, name, ["doc"], _EARLIER, "features").num_rows}


class _Points:
    """The features of documents as rows of an array float16 [n, dim] that stays on disk."""

    ndim, dtype = 2, np.dtype(np.float16)

    def __init__(self, runner: Runner, folder: str, sizes: dict[str, int], dim: int) -> None:
        """`sizes` are the documents of each shard."""
        self.shape: tuple[int, ...] = (sum(sizes.values()), dim)
        self._runner, self._folder, self._names = runner, folder, list(sizes)
        self._ends = np.cumsum(list(sizes.values()))
        self._places, self._rows = np.empty(0, np.int64), np.empty((0, dim), np.float16)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The features of some rows; those of the last reading are not read again."""
        if not np.isin(rows, self._places).all():
            self._places = np.unique(rows)
            shards = np.searchsorted(self._ends, self._places, side="right")
            starts = np.concatenate([[0], self._ends])
            wanted = {
                self._names[shard]: (self._places[shards == shard] - starts[shard]).tolist()
                for shard in np.unique(shards).tolist()
            }
            sample = self._runner.folder / "sample"
            sample.remove()  # of an earlier reading
            work = functools.partial(_sample, self._folder, self._runner.run)
            for _ in self._runner.engine.map(work, list(wanted.items())):
                pass
            tables = [sample.read_table(f"{name}.parquet") for name in wanted]
            self._rows = np.concatenate([_rows(table["feature"], np.float16) for table in tables])
            sample.remove()
        return self._rows[np.searchsorted(self._places, rows)]


def _sample(vectors: str, run: Run, task: tuple[str, list[int]]) -> None:
    """Writes the features of some rows of a shard, which count only its documents that are compared."""
    name, rows = task
    docs = survivors(run, name, ["doc"], _EARLIER, "features")["doc"].take(pa.array(rows))
    table = (run.work / vectors).read_table(f"{name}.parquet", ["doc", "feature"])
    found = table.filter(pa.array(np.isin(table["doc"].to_numpy(), docs.to_numpy()))).select(["feature"])
    (run.work / DenseCopies.name / "sample").write_table(f"{name}.parquet", found)


def _batches(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Shards whose clusters one task finds, by the name of the task. `sizes` are the documents of each shard."""
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
    return {f"{number:06d}": batch for number, batch in enumerate(batches)}


def _assign(centroids: np.ndarray, vectors: str, batches: dict[str, list[str]], run: Run, name: str) -> Result:
    """Writes the nearest cluster of each document of a batch, and these documents sorted by all clusters near them."""
    docs, features, signatures = [], [], []
    for shard in batches[name]:
        table = survivors(run, shard, ["doc", "signature"], _EARLIER, "features")
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
    columns = {"doc": doc_N, "cluster": nearest[:, 0].astype(np.int64), "cosine": cosines[:, 0]}
    (folder / "assigned").write_table(f"{name}.parquet", pa.table(columns))
    if config.enabled:
        keys = nearest.ravel()
        order = np.argsort(keys, kind="stable")[np.count_nonzero(keys < 0) :]
        rows = order // nearest.shape[1]  # ascending in each cluster, as the sort is stable
        members = {"key": keys[order].astype(np.int64), "doc": doc_N[rows]}
        members |= {"feature": binary_rows(feature_ND[rows]), "signature": binary_rows(signature_NS[rows])}
        (folder / "members").write_table(f"{name}.parquet", pa.table(members), rows=_MEMBER_ROWS)
    return {"documents": len(doc_N), "members": _count_clusters(nearest[nearest >= 0])}


def _count_clusters(clusters: np.ndarray) -> list[list[int]]:
    """[cluster, documents] of the clusters that occur."""
    return np.stack(np.unique(clusters, return_counts=True), axis=1).tolist()


def _sum_counts(results: Sequence[Result], field: str, clusters: int) -> np.ndarray:
    """int64 [clusters]: the documents of each cluster, from the counts of all tasks."""
    sums = np.zeros(clusters, np.int64)
    for result in results:
        counts = np.array(result[field], np.int64).reshape(-1, 2)
        sums[counts[:, 0]] += counts[:, 1]
    return sums


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


def _place(runner: Runner, batches: dict[str, list[str]], clusters: int, corpus: int) -> list[dict[str, Any]]:
    """Writes (doc, cluster, weight) of the documents that stay, out of `corpus` ones; descriptions of clusters."""
    names, folder = list(batches), runner.folder
    counted = runner.map(functools.partial(_score, batches, corpus), names, suffix="-scored")
    sizes = _sum_counts(counted, "clusters", clusters)
    # A table, because every task needs it.
    replace_table(folder / "sums", add_counts([(folder / "scores").read_table(f"{name}.parquet") for name in names]))
    # Before the tasks, so that a wrong config is an error of this process.
    weigher = _weigher(runner.run, sizes, corpus)
    chosen = clustering.largest_clusters(sizes)
    found = runner.map(functools.partial(_find_factors, sizes, corpus, chosen), names, suffix="-factors")
    factors = add_counts([(folder / "factors").read_table(f"{name}.parquet") for name in names])
    runner.map(functools.partial(_weigh, weigher.scales(factors)), names, suffix="-placed")

    def read(documents: Sequence[int]) -> list[str]:
        return _texts(runner.run.work / "filter" / "shards", np.array(documents, np.int64))

    return clustering.describe_clusters(chosen, [result["members"] for result in found], read)


def _score(batches: dict[str, list[str]], corpus: int, run: Run, name: str) -> Result:
    """Writes what is known of the documents of a batch that stay, and the counts of their scores."""
    folder = run.work / DenseCopies.name
    columns, stages = ["doc", "source", "language", "score", "bytes"], (*_EARLIER, DenseCopies.name)
    table = pa.concat_tables(survivors(run, shard, columns, stages, "features") for shard in batches[name])
    assigned = (folder / "assigned").read_table(f"{name}.parquet")
    assigned = assigned.filter(pa.array(np.isin(assigned["doc"].to_numpy(), table["doc"].to_numpy())))
    table = table.append_column("cluster", assigned["cluster"]).append_column("cosine", assigned["cosine"])
    (folder / "kept").write_table(f"{name}.parquet", table)
    language, source, score, size, cluster = _columns(table, ["language", "source", "score", "bytes", "cluster"])
    (folder / "scores").write_table(f"{name}.parquet", count_scores(language, source, score, size, corpus))
    return {"clusters": _count_clusters(cluster)}


def _weigher(run: Run, sizes: np.ndarray, corpus: int) -> Weigher:
    sums = (run.work / DenseCopies.name / "sums").read_table("rows.parquet")
    return Weigher(sums, sizes, corpus, run.config.weights)


def _find_factors(sizes: np.ndarray, corpus: int, chosen: list[int], run: Run, name: str) -> Result:
    """Writes the factors of the documents of a batch and their counts; returns the members of the chosen clusters."""
    folder = run.work / DenseCopies.name
    table = (folder / "kept").read_table(f"{name}.parquet")
    doc, language, source, score = _columns(table, ["doc", "language", "source", "score"])
    size, cluster, cosine = _columns(table, ["bytes", "cluster", "cosine"])
    found = _weigher(run, sizes, corpus).factors(cluster, score, source, language)
    (folder / "factors").write_table(f"{name}.parquet", count_factors(language, found, size))
    columns = table.select(["doc", "cluster", "language"]).append_column("factor", [found])
    (folder / "weighed").write_table(f"{name}.parquet", columns)
    return {"members": clustering.members_of(chosen, cluster, doc, cosine, score, source, language)}


def _weigh(scales: dict[str, float], run: Run, name: str) -> Result:
    """Writes the weights of the documents of a batch."""
    folder = run.work / DenseCopies.name
    table = (folder / "weighed").read_table(f"{name}.parquet")
    language, factors = _columns(table, ["language", "factor"])
    weights = scaled_weights(language, factors, scales, run.config.weights)
    (folder / "placed").write_table(
        f"{name}.parquet", table.select(["doc", "cluster"]).append_column("weight", [weights])
    )
    return {"documents": table.num_rows}


def _columns(table: pa.Table, names: list[str]) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in names]


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
