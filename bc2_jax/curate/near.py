"""Near copies among documents whose MinHash signatures are on disk, as dataframes of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bc2_jax.curate.copies import components, later_copies
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.minhash import VALUES, similarity

if TYPE_CHECKING:
    from daft import DataFrame

# Components whose members differ too much from their first are taken apart again, at most so often.
_ROUNDS = 4


def band_edges(bands: DataFrame, engine: Engine) -> DataFrame:
    """Candidates (a, b), b < a, from rows (key, doc): every document with the first of each bucket it is in."""
    from daft import col

    copies = later_copies(bands, ["key"], "doc", engine)
    return copies.select(col("doc").alias("a"), col("first").alias("b")).distinct()


def resolve(edges: DataFrame, signatures: DataFrame, least: float, engine: Engine) -> DataFrame:
    """Which documents are copies of which: (doc, first, similarity), each doc once, from candidate edges (a, b).

    Edges whose estimated similarity is below `least` go. Of each connected component the first document stays and those
    that are at least so similar to it go; what is joined to the first only through others is looked at again without
    those that went. So everything removed has a similar document that stays.
    """
    from daft import col

    edges = similar(edges, "a", "b", signatures, least).collect()
    parts = []
    for _ in range(_ROUNDS):
        if edges.count_rows() == 0:
            break
        joined = components(edges, engine).select(col("node").alias("doc"), "first")
        copies = similar(joined, "doc", "first", signatures, least).collect()
        parts.append(copies)
        left = joined.join(copies.select("doc"), on="doc", how="anti").select("doc")
        edges = edges.join(left, left_on="a", right_on="doc", how="semi")
        edges = edges.join(left, left_on="b", right_on="doc", how="semi").collect()
    result = parts[0] if parts else edges.select(col("a").alias("doc"), col("b").alias("first"), "similarity")
    for part in parts[1:]:
        result = result.concat(part)
    return result.collect()


def similar(pairs: DataFrame, one: str, other: str, signatures: DataFrame, least: float) -> DataFrame:
    """The pairs whose documents, int64, have an estimated similarity of at least `least`, with it: (one, other,
    similarity float32)."""
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
