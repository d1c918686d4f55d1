"""A shard: one parquet file of documents, and the account of what a stage took out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from bc2_jax.curate.storage import Folder

# A document's number is unit << 32 | part << 20 | place: unit and part say its shard.
_PART_BITS, _PLACE_BITS = 12, 20
MOST_DOCUMENTS = 1 << _PLACE_BITS
MOST_PARTS = 1 << _PART_BITS
_EXCERPT = 300

REMOVED = pa.schema(
    [
        ("doc", pa.int64()),
        ("id", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("kept", pa.string()),  # the id of the document that stays in its place
        ("source", pa.string()),
        ("language", pa.string()),
        ("bytes", pa.int64()),
        ("excerpt", pa.string()),
    ]
)


def shard_name(unit: int, part: int) -> str:
    return f"{unit:06d}-{part:04d}"


def first_document(name: str) -> int:
    """The number of a shard's first document."""
    unit, part = name.split("-")
    return int(unit) << (_PART_BITS + _PLACE_BITS) | int(part) << _PLACE_BITS


def text_bytes(table: pa.Table) -> int:
    return pc.sum(pc.binary_length(table["text"])).as_py() or 0


def decisions_for(folder: Folder, name: str, column: str = "doc", shift: int = 0) -> pa.Table:
    """The rows of a folder of decisions that concern one shard, sorted by `column`: a document's number << shift."""
    low, high = first_document(name) << shift, (first_document(name) + MOST_DOCUMENTS) << shift
    return folder.select((ds.field(column) >= low) & (ds.field(column) < high)).sort_by(column)


class Account:
    """What one stage did to one shard: counts for the report and the rows it removed."""

    def __init__(self, table: pa.Table) -> None:
        self._removed: list[pa.Table] = []
        self._counts: dict[str, dict[str, int]] = {}
        self.before = {"documents": table.num_rows, "bytes": text_bytes(table)}

    def drop(
        self, table: pa.Table, stage: str, places: np.ndarray, reasons: Sequence[str], kept: pa.Array | None = None
    ) -> pa.Table:
        """`table` without the rows at `places`, which are noted with why and, for copies, what stays instead."""
        if not len(places):
            return table
        rows = table.take(pa.array(places))
        sizes = pc.binary_length(rows["text"])
        columns: dict[str, Any] = {name: rows[name] for name in ("doc", "id", "source", "language")}
        columns |= {
            "stage": pa.array([stage] * len(places)),
            "reason": pa.array(list(reasons), pa.string()),
            "kept": pa.nulls(len(places), pa.string()) if kept is None else kept,
            "bytes": pc.cast(sizes, pa.int64()),
            "excerpt": pc.utf8_slice_codeunits(rows["text"], 0, _EXCERPT),
        }
        self._removed.append(pa.table({name: columns[name] for name in REMOVED.names}).cast(REMOVED))
        self.count(stage, len(places), pc.sum(sizes).as_py())
        keep = np.ones(table.num_rows, bool)
        keep[places] = False
        return table.filter(pa.array(keep))

    def drop_copies(self, table: pa.Table, stage: str, decisions: pa.Table, reason: str) -> pa.Table:
        """Drops the documents that decisions (doc, kept) name. They may name some that are gone already."""
        _, places, rows = np.intersect1d(
            table["doc"].to_numpy(), decisions["doc"].to_numpy(), assume_unique=True, return_indices=True
        )
        kept = decisions["kept"].take(pa.array(rows))
        return self.drop(table, stage, places, [reason] * len(places), kept)

    def count(self, stage: str, documents: int, size: int) -> None:
        """Notes that a stage took out so many documents and bytes of text."""
        entry = self._counts.setdefault(stage, {"documents": 0, "bytes": 0})
        entry["documents"] += documents
        entry["bytes"] += size

    @property
    def removed(self) -> pa.Table:
        return pa.concat_tables([REMOVED.empty_table(), *self._removed])

    def result(self, table: pa.Table) -> dict[str, Any]:
        """Counts, as JSON; `table` is what is left."""
        after = {"documents": table.num_rows, "bytes": text_bytes(table)}
        return {"before": self.before, "after": after, "removed": self._counts}
