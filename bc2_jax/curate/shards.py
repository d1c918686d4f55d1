"""A shard: one parquet file of documents, and the account of what a stage took out of it."""

from __future__ import annotations

import collections
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

CUTS = pa.schema(
    [
        ("doc", pa.int64()),
        ("id", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("source", pa.string()),
        ("language", pa.string()),
        ("text", pa.large_string()),  # the whole of what was cut out
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


def binary_rows(rows: np.ndarray) -> pa.Array:
    """A column with the bytes of each row."""
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.tobytes())])


def decisions_for(folder: Folder, name: str, column: str = "doc", shift: int = 0) -> pa.Table:
    """The rows of a folder of decisions that concern one shard, sorted by `column`: a document's number << shift."""
    low, high = first_document(name) << shift, (first_document(name) + MOST_DOCUMENTS) << shift
    return folder.select((ds.field(column) >= low) & (ds.field(column) < high)).sort_by(column)


class Account:
    """What one stage did to one shard: counts for the report, the rows it removed, and what it cut out of others."""

    def __init__(self, table: pa.Table) -> None:
        self._removed: list[pa.Table] = []
        self._cuts: list[pa.Table] = []
        self._counts: dict[str, dict[str, int]] = {}
        self.before = {"documents": table.num_rows, "bytes": text_bytes(table)}

    def note(
        self,
        table: pa.Table,
        stage: str,
        places: np.ndarray,
        reasons: Sequence[str],
        kept: pa.Array | None = None,
        size: int | None = None,
    ) -> None:
        """Notes that a stage takes out the rows at `places`: why and, for copies, the id of what stays instead.

        `size` is how many bytes of text that is, if it is not all of theirs.
        """
        if not len(places):
            return
        rows = table.take(pa.array(places))
        sizes = pc.cast(pc.binary_length(rows["text"]), pa.int64())
        columns: dict[str, Any] = {name: rows[name] for name in ("doc", "id", "source", "language")}
        columns |= {
            "stage": pa.array([stage] * len(places)),
            "reason": pa.array(list(reasons), pa.string()),
            "kept": pa.nulls(len(places), pa.string()) if kept is None else kept,
            "bytes": sizes,
            "excerpt": pc.utf8_slice_codeunits(rows["text"], 0, _EXCERPT),
        }
        self._removed.append(pa.table({name: columns[name] for name in REMOVED.names}).cast(REMOVED))
        self.count(stage, len(places), pc.sum(sizes).as_py() if size is None else size)

    def note_cuts(
        self, table: pa.Table, stage: str, places: Sequence[int], reasons: Sequence[str], texts: Sequence[str]
    ) -> None:
        """Lists what is cut out of the rows at `places`, each as often as it has cuts; `count` counts the bytes."""
        rows = table.take(pa.array(places, pa.int64()))
        columns: dict[str, Any] = {name: rows[name] for name in ("doc", "id", "source", "language")}
        columns |= {"stage": pa.array([stage] * len(places)), "reason": pa.array(list(reasons), pa.string())}
        columns["text"] = pa.array(list(texts), pa.large_string())
        self._cuts.append(pa.table({name: columns[name] for name in CUTS.names}).cast(CUTS))

    def drop(
        self, table: pa.Table, stage: str, places: np.ndarray, reasons: Sequence[str], kept: pa.Array | None = None
    ) -> pa.Table:
        """`table` without the rows at `places`, which are noted."""
        self.note(table, stage, places, reasons, kept)
        keep = np.ones(table.num_rows, bool)
        keep[places] = False
        return table.filter(pa.array(keep))

    def drop_copies(self, table: pa.Table, stage: str, decisions: pa.Table, reason: str) -> pa.Table:
        """Drops the documents that decisions (doc, kept, detail) name. They may name some that are gone already."""
        _, places, rows = np.intersect1d(
            table["doc"].to_numpy(), decisions["doc"].to_numpy(), assume_unique=True, return_indices=True
        )
        chosen = decisions.take(pa.array(rows))
        reasons = [f"{reason}{detail}" for detail in chosen["detail"].to_pylist()]
        return self.drop(table, stage, places, reasons, chosen["kept"])

    def count(self, stage: str, documents: int, size: int) -> None:
        """Notes that a stage took out so many documents and bytes of text."""
        entry = self._counts.setdefault(stage, {"documents": 0, "bytes": 0})
        entry["documents"] += documents
        entry["bytes"] += size

    @property
    def removed(self) -> pa.Table:
        return pa.concat_tables([REMOVED.empty_table(), *self._removed])

    @property
    def cuts(self) -> pa.Table:
        return pa.concat_tables([CUTS.empty_table(), *self._cuts])

    def result(self, table: pa.Table) -> dict[str, Any]:
        """Counts, as JSON; `table` is what is left."""
        after = {"documents": table.num_rows, "bytes": text_bytes(table)}
        return {"before": self.before, "after": after, "removed": self._counts}


def count_by(table: pa.Table, column: str) -> dict[str, dict[str, int]]:
    """Documents and bytes of text for each value of a column."""
    rows = pa.table({"key": table[column], "bytes": pc.cast(pc.binary_length(table["text"]), pa.int64())})
    groups = rows.group_by("key").aggregate([("bytes", "count"), ("bytes", "sum")]).sort_by("key").to_pylist()
    return {row["key"]: {"documents": row["bytes_count"], "bytes": row["bytes_sum"]} for row in groups}


def first_of_each(removed: pa.Table, count: int = 3) -> list[dict[str, Any]]:
    """The first few removed documents of each stage and rule, in order."""
    rules = [
        (stage, reason.split(" = ")[0] if stage == "heuristics" else "")
        for stage, reason in zip(removed["stage"].to_pylist(), removed["reason"].to_pylist(), strict=True)
    ]
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    chosen = []
    for place, rule in enumerate(rules):
        seen[rule] += 1
        if seen[rule] <= count:
            chosen.append(place)
    return removed.take(pa.array(chosen, pa.int64())).to_pylist()
