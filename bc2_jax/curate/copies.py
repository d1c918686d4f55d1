"""Exact and near copies as dataframes of integers, over all documents at once (paper section 2.1)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from bc2_jax.curate.engine import Engine
from bc2_jax.curate.minhash import VALUES, similarity

if TYPE_CHECKING:
    from daft import DataFrame, Expression

# Rows that one machine groups at a time.
_GROUPED_ROWS = 4_000_000
_MOST_ROUNDS = 50
# How often a component is split whose members are not similar to its first document.
_SPLITS = 4


def later_copies(frame: DataFrame, keys: list[str], place: str, engine: Engine, least: int = 2) -> DataFrame:
    """All rows but the first of each group of at least `least` rows with equal `keys` (int64).

    `place` (int64) orders the rows. Returns the keys and the place of each row, and `first`, the place of its group's
    first row, in any order. One machine groups one range of the first key at a time, so that memory does not grow with
    the input.
    """
    from daft import col, lit

    by: list[Expression | str] = list(keys)
    parts = []
    ranges = 1 if engine.is_distributed else -(-frame.count_rows() // _GROUPED_ROWS)
    for index in range(max(ranges, 1)):
        part = frame.where(in_range(col(keys[0]), index, ranges)) if ranges > 1 else frame
        groups = part.groupby(*by).agg(col(place).min().alias("first"), col(place).count().alias("copies"))
        groups = groups.where(col("copies") >= lit(least)).select(*keys, "first")
        copies = part.join(groups, on=by).where(col(place) != col("first")).select(*keys, place, "first")
        parts.append(copies.collect() if ranges > 1 else copies)
    return functools.reduce(lambda one, other: one.concat(other), parts)


def in_range(key, index: int, ranges: int):
    """Whether an int64 key is in range `index` of `ranges` equal ranges of all int64 values."""
    width = (1 << 64) // ranges
    low = -(1 << 63) + index * width
    condition = key >= low
    return condition if index == ranges - 1 else condition & (key < low + width)


def components(edges: DataFrame, engine: Engine) -> DataFrame:
    """Connected components of a graph with edges (a, b), int64: (node, first), `first` the smallest of its component.

    The alternating stars of Kiveris et al. 2014 (Connected Components in MapReduce and Beyond); the number of rounds
    grows with the logarithm of the longest path. The smallest node of a component is not listed.
    """
    from daft import col
    from daft.functions import columns_max, columns_min

    a, b, least = col("a"), col("b"), col("least")

    def settled(pairs: DataFrame) -> DataFrame:
        pairs = pairs.where(a != b).distinct()
        # Without this each round on a cluster multiplies the partitions.
        return (pairs.into_partitions(engine.partitions()) if engine.is_distributed else pairs).collect()

    current = settled(edges.select(columns_max(a, b).alias("a"), columns_min(a, b).alias("b")))
    for _ in range(_MOST_ROUNDS):
        # Large star: the larger neighbours of a node are joined to the smallest of its neighbours and itself.
        both = current.concat(current.select(b.alias("a"), a.alias("b")))
        smallest = both.groupby("a").agg(b.min().alias("least"))
        stars = both.join(smallest, on="a").where(b > a)
        large = settled(stars.select(b.alias("a"), columns_min(a, least).alias("b")))
        # Small star: a node and its smaller neighbours are joined to the smallest of them.
        smallest = large.groupby("a").agg(b.min().alias("least"))
        stars = large.join(smallest, on="a").select(b.alias("a"), least.alias("b"))
        small = settled(stars.concat(smallest.select("a", least.alias("b"))))
        rows = small.count_rows()
        if rows == current.count_rows() and rows == small.join(current, on=["a", "b"]).count_rows():
            return small.select(a.alias("node"), b.alias("first"))
        current = small
    raise RuntimeError(f"the connected components did not settle in {_MOST_ROUNDS} rounds.")


def band_edges(bands: DataFrame, engine: Engine) -> DataFrame:
    """Candidates (a, b), b < a, from rows (key, doc): each document with the first document of each of its buckets."""
    from daft import col

    copies = later_copies(bands, ["key"], "doc", engine)
    return copies.select(col("doc").alias("a"), col("first").alias("b")).distinct()


def resolve(edges: DataFrame, signatures: DataFrame, least: float, engine: Engine) -> DataFrame:
    """The documents to drop: (doc, first, similarity), each doc once, from candidate edges (a, b).

    Drops edges whose estimated similarity is below `least`. In each connected component the first document stays, and
    the documents that are similar to it are dropped; the rest, joined to it only through others, is resolved again
    among itself. So every document dropped has a similar document that stays.
    """
    from daft import col

    edges = _similar(edges, "a", "b", signatures, least).collect()
    parts = []
    for _ in range(_SPLITS):
        if edges.count_rows() == 0:
            break
        joined = components(edges, engine).select(col("node").alias("doc"), "first")
        copies = _similar(joined, "doc", "first", signatures, least).collect()
        parts.append(copies)
        left = joined.join(copies.select("doc"), on="doc", how="anti").select("doc")
        edges = edges.join(left, left_on="a", right_on="doc", how="semi")
        edges = edges.join(left, left_on="b", right_on="doc", how="semi").collect()
    parts = parts or [edges.select(col("a").alias("doc"), col("b").alias("first"), "similarity")]
    return functools.reduce(lambda one, other: one.concat(other), parts).collect()


def _similar(pairs: DataFrame, one: str, other: str, signatures: DataFrame, least: float) -> DataFrame:
    """The pairs whose estimated similarity is at least `least`: (one, other, similarity float32)."""
    import daft
    from daft import col, lit

    @daft.func.batch(return_dtype=daft.DataType.float32(), use_process=False)
    def estimate(a: daft.Series, b: daft.Series) -> np.ndarray:
        rows = [np.frombuffer(b"".join(x.to_pylist()), np.uint32).reshape(-1, VALUES) for x in (a, b)]
        return similarity(*rows)

    left = signatures.select(col("doc").alias(one), col("signature").alias("left"))
    right = signatures.select(col("doc").alias(other), col("signature").alias("right"))
    both = pairs.join(left, on=one).join(right, on=other)
    found = both.select(one, other, estimate(col("left"), col("right")).alias("similarity"))
    return found.where(col("similarity") >= lit(least))
