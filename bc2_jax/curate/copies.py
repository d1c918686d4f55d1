"""Who is a copy of whom, as dataframes of integers: the part of deduplication that looks at everything at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bc2_jax.curate.engine import Engine

if TYPE_CHECKING:
    from daft import DataFrame, Expression

# Rows whose groups are held at one time on one machine.
_GROUPED_ROWS = 4_000_000
_MOST_ROUNDS = 50


def later_copies(frame: DataFrame, keys: list[str], place: str, engine: Engine, least: int = 2) -> DataFrame:
    """All rows but the first of each group of at least `least` rows with equal `keys` (int64).

    `place` (int64) says where a row stands; the first is the one with the smallest. Returns the rows' keys and place,
    and `first`, the place of their group's first row, in no particular order. On one machine the groups are made in
    ranges of the first key, so that memory does not grow with the input.
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
    result = parts[0]
    for part in parts[1:]:
        result = result.concat(part)
    return result


def in_range(key, index: int, ranges: int):
    """Whether an int64 key, taken as spread over all its values, is in one of `ranges` equal ranges."""
    width = (1 << 64) // ranges
    low = -(1 << 63) + index * width
    condition = key >= low
    return condition if index == ranges - 1 else condition & (key < low + width)


def components(edges: DataFrame, engine: Engine) -> DataFrame:
    """Connected components of a graph with edges (a, b), int64: `node` and `first`, the smallest node it is joined to.

    The alternating stars of Kiveris et al. 2014 (Connected Components in MapReduce and Beyond): the number of rounds
    grows with the logarithm of the longest path. Nodes that are the smallest of their component are not listed.
    """
    from daft import col
    from daft.functions import columns_max, columns_min

    a, b, least = col("a"), col("b"), col("least")

    def settled(pairs: DataFrame) -> DataFrame:
        pairs = pairs.where(a != b).distinct()
        # On a cluster each round would otherwise multiply the partitions.
        return (pairs.into_partitions(engine.partitions()) if engine.is_distributed else pairs).collect()

    current = settled(edges.select(columns_max(a, b).alias("a"), columns_min(a, b).alias("b")))
    for _ in range(_MOST_ROUNDS):
        # Large star: the larger neighbours of a node go to the smallest of its neighbours and itself.
        both = current.concat(current.select(b.alias("a"), a.alias("b")))
        smallest = both.groupby("a").agg(b.min().alias("least"))
        stars = both.join(smallest, on="a").where(b > a)
        large = settled(stars.select(b.alias("a"), columns_min(a, least).alias("b")))
        # Small star: the smaller neighbours of a node, and the node itself, go to the smallest of them.
        smallest = large.groupby("a").agg(b.min().alias("least"))
        stars = large.join(smallest, on="a").select(b.alias("a"), least.alias("b"))
        small = settled(stars.concat(smallest.select("a", least.alias("b"))))
        rows = small.count_rows()
        if rows == current.count_rows() and rows == small.join(current, on=["a", "b"]).count_rows():
            return small.select(a.alias("node"), b.alias("first"))
        current = small
    raise RuntimeError(f"the connected components did not settle in {_MOST_ROUNDS} rounds.")
