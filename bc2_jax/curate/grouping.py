"""Dense features of all documents -> near copies, clusters and sampling weights, on the mesh of this process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bc2_jax.curate import clustering, dense
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.minhash import VALUES, similarity
from bc2_jax.curate.near import resolve
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.topics import describe_clusters
from bc2_jax.curate.weights import sampling_weights

_EXAMPLE_CHARACTERS = 80


class Documents:
    """What is known of the documents that are compared: arrays of equal length in the order of their numbers.

    Features and signatures are mapped files in a temporary folder, so that they may be larger than memory.
    """

    def __init__(self, folder: Folder, vectors: Folder, gone: Sequence[Folder], dim: int, temporary: Path) -> None:
        names = folder.names(".parquet")
        columns = ["doc", "source", "language", "score", "bytes"]
        dropped = np.concatenate([decisions.select(None, ["doc"])["doc"].to_numpy() for decisions in gone])
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
            # Those of a model are of the documents that are left alone.
            feature = vectors.read_table(name, ["feature"])["feature"]
            feature = feature if len(feature) == len(signature) else feature.filter(kept)
            stop = start + len(signature)
            self.features[start:stop] = _rows(feature, np.float16, dim)
            self.signatures[start:stop] = _rows(signature, np.uint32, VALUES)
            start = stop


def group(
    folder: Folder,
    vectors: Folder,
    gone: Sequence[Folder],
    dim: int,
    config: CurationConfig,
    engine: Engine,
    texts: Any,
) -> dict[str, Any]:
    """Compares what `write_features` wrote to `folder`, without the documents in `gone` (decisions).

    `vectors` has the dense features, `texts` gives the texts of some documents by their numbers. Returns copies (doc,
    first), or None if none were looked for, placed (doc, cluster, weight) of all others, and topics for the report.
    """
    import daft

    with tempfile.TemporaryDirectory() as temporary:
        documents = Documents(folder, vectors, gone, dim, Path(temporary))
        docs, table = documents.docs, documents.table
        if not len(docs):
            empty = {"doc": docs, "cluster": np.empty(0, np.int64), "weight": np.empty(0, np.float32)}
            return {"copies": None, "placed": pa.table(empty), "topics": []}
        centroids = clustering.fit(documents.features, config.clusters)
        near_by, cosines = clustering.assign(documents.features, centroids, config.dense.clusters_per_document)
        copies = None
        if config.dense.enabled:
            signed = documents.signatures

            def jaccard(first: np.ndarray, second: np.ndarray) -> np.ndarray:
                return similarity(signed[first], signed[second])

            pairs = dense.near_duplicates(documents.features, near_by, jaccard, config.dense)
            edges = daft.from_pydict({"a": docs[pairs.second], "b": docs[pairs.first]})
            known = np.unique(np.concatenate([pairs.first, pairs.second]))
            blobs = pa.array([signed[i].tobytes() for i in known], pa.binary())
            signatures_of = daft.from_pydict({"doc": docs[known], "signature": blobs})
            copies = resolve(edges, signatures_of, config.dense.jaccard, engine)
    stays = np.ones(len(docs), bool)
    if copies is not None:
        stays = ~np.isin(docs, np.array(copies.select("doc").to_pydict()["doc"], np.int64))
    clusters = near_by[stays, 0]
    kept = table.filter(pa.array(stays))
    scores = kept["score"].to_numpy()
    weights = sampling_weights(
        np.bincount(clusters, minlength=len(centroids)), clusters, scores, kept["source"].to_numpy(), config.weights,
        languages=kept["language"].to_numpy(), sizes=kept["bytes"].to_numpy(),
    )  # fmt: skip
    placed = pa.table({"doc": docs[stays], "cluster": clusters.astype(np.int64), "weight": weights})
    seen: dict[int, str] = {}

    def read(rows: Sequence[int]) -> list[str]:
        found = texts(docs[stays][list(rows)])
        seen.update(zip(rows, found, strict=True))
        return found

    topics = describe_clusters(
        clusters, cosines[stays, 0], scores, kept["source"].to_numpy(), kept["language"].to_numpy(), read
    )
    described = [
        {
            "cluster": topic.cluster,
            "documents": topic.documents,
            "score": round(topic.mean_score, 4),
            "sources": [name for name, _ in topic.sources],
            "languages": [name for name, _ in topic.languages],
            "words": list(topic.words),
            "examples": [seen[row][:_EXAMPLE_CHARACTERS] for row in topic.examples],
        }
        for topic in topics
    ]
    return {"copies": copies, "placed": placed, "topics": described}


def _mapped(path: Path, shape: tuple[int, int], dtype: Any) -> np.ndarray:
    if not shape[0]:
        return np.empty(shape, dtype)
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    path.unlink()  # the mapping stays; the file must not outlive a process that is killed
    return array


def _rows(column: pa.ChunkedArray, dtype: Any, width: int) -> np.ndarray:
    """Rows of a fixed-size binary column."""
    parts: list[np.ndarray] = [np.empty((0, width), dtype)]
    for chunk in column.chunks:
        rows: np.ndarray = np.frombuffer(chunk.buffers()[1], dtype).reshape(-1, width)
        parts.append(rows[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)
