"""Shards of documents: their names and numbers, and the account of what a stage removed from one."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from bc2_jax.curate.storage import Folder

# A document's number is unit << 32 | part << 20 | place. Unit and part name its shard.
_PART_BITS, PLACE_BITS = 12, 20
MOST_DOCUMENTS = 1 << PLACE_BITS
MOST_PARTS = 1 << _PART_BITS
_EXCERPT = 300
_SAMPLES_PER_RULE = 3

REMOVED = pa.schema(
    [
        ("doc", pa.int64()),
        ("id", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("kept", pa.string()),  # id of the document that was kept instead
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
        ("text", pa.large_string()),  # all of what was cut out
    ]
)


def shard_name(unit: int, part: int) -> str:
    return f"{unit:06d}-{part:04d}"


def first_document(name: str) -> int:
    """The number of a shard's first document."""
    unit, part = name.split("-")
    return int(unit) << (_PART_BITS + PLACE_BITS) | int(part) << PLACE_BITS


def text_sizes(table: pa.Table) -> pa.ChunkedArray:
    """UTF-8 bytes of each text, int64."""
    return pc.cast(pc.binary_length(table["text"]), pa.int64())


def text_bytes(table: pa.Table) -> int:
    """UTF-8 bytes of all texts."""
    return pc.sum(pc.binary_length(table["text"])).as_py() or 0


def binary_rows(rows: np.ndarray) -> pa.Array:
    """A fixed-size binary column with the bytes of each row of an array [N, width]."""
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.tobytes())])


def decisions_for(folder: Folder, name: str, column: str = "doc", shift: int = 0) -> pa.Table:
    """The rows of a folder that concern one shard, sorted by `column`, which has document numbers << `shift`."""
    low, high = first_document(name) << shift, (first_document(name) + MOST_DOCUMENTS) << shift
    return folder.select((ds.field(column) >= low) & (ds.field(column) < high)).sort_by(column)


def replace_table(folder: Folder, table: pa.Table) -> None:
    """Makes `table` the only file of a folder."""
    folder.remove()
    folder.write_table("rows.parquet", table)


def write_decisions(documents: Any, kept: Any, details: Sequence[str], folder: Folder) -> int:
    """Writes folder/decisions (doc, kept, detail): documents to drop, the ids kept instead, additions to the reason.

    Returns the number of rows.
    """
    schema = pa.schema([("doc", pa.int64()), ("kept", pa.string()), ("detail", pa.string())])
    table = pa.table({"doc": documents, "kept": kept, "detail": details}, schema)
    replace_table(folder / "decisions", table)
    return table.num_rows


class Account:
    """What a stage did to one shard: counts for the report, documents removed, pieces cut out of other documents."""

    def __init__(self, table: pa.Table) -> None:
        self._removed: list[pa.Table] = []
        self._cuts: list[pa.Table] = []
        self._counts: dict[str, dict[str, int]] = {}
        self.before = {"documents": table.num_rows, "bytes": text_bytes(table)}

    def note(
        self, table: pa.Table, stage: str, places: np.ndarray, reasons: Sequence[str], kept: pa.Array | None = None,
        size: int | None = None,
    ) -> None:  # fmt: skip
        """Lists the rows at `places` as removed by `stage`, with reasons and, for copies, the ids kept instead.

        `size` is the number of bytes to count, by default those of the texts.
        """
        if not len(places):
            return
        rows = table.take(pa.array(places))
        sizes = text_sizes(rows)
        excerpts = pc.utf8_slice_codeunits(rows["text"], 0, _EXCERPT)
        kept = pa.nulls(len(places), pa.string()) if kept is None else kept
        added = {"kept": kept, "bytes": sizes, "excerpt": excerpts}
        self._removed.append(_listed(REMOVED, rows, stage, reasons, added))
        self.count(stage, len(places), pc.sum(sizes).as_py() if size is None else size)

    def note_cuts(
        self, table: pa.Table, stage: str, places: Sequence[int], reasons: Sequence[str], texts: Sequence[str]
    ) -> None:
        """Lists pieces cut out of the rows at `places`, one place for each piece; `count` counts their bytes."""
        rows = table.take(pa.array(places, pa.int64()))
        self._cuts.append(_listed(CUTS, rows, stage, reasons, {"text": pa.array(list(texts), pa.large_string())}))

    def drop(
        self, table: pa.Table, stage: str, places: np.ndarray, reasons: Sequence[str], kept: pa.Array | None = None
    ) -> pa.Table:
        """`table` without the rows at `places`, which are noted."""
        self.note(table, stage, places, reasons, kept)
        keep = np.ones(table.num_rows, bool)
        keep[places] = False
        return table.filter(pa.array(keep))

    def drop_copies(self, table: pa.Table, stage: str, decisions: pa.Table, reason: str) -> pa.Table:
        """Drops the documents that decisions (doc, kept, detail) name and that `table` still has."""
        _, places, rows = np.intersect1d(
            table["doc"].to_numpy(), decisions["doc"].to_numpy(), assume_unique=True, return_indices=True
        )
        chosen = decisions.take(pa.array(rows))
        reasons = [f"{reason}{detail}" for detail in chosen["detail"].to_pylist()]
        return self.drop(table, stage, places, reasons, chosen["kept"])

    def count(self, stage: str, documents: int, size: int) -> None:
        """Adds documents and bytes of text to what a stage removed."""
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
        """Counts, as JSON; `table` has the documents that are left."""
        after = {"documents": table.num_rows, "bytes": text_bytes(table)}
        return {"before": self.before, "after": after, "removed": self._counts}


def _listed(schema: pa.Schema, rows: pa.Table, stage: str, reasons: Sequence[str], added: dict[str, Any]) -> pa.Table:
    """A table of `schema` for these rows."""
    columns = {name: rows[name] for name in ("doc", "id", "source", "language")} | added
    columns |= {"stage": pa.array([stage] * rows.num_rows), "reason": pa.array(list(reasons), pa.string())}
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)


def count_by(table: pa.Table, column: str) -> dict[str, dict[str, int]]:
    """Documents and bytes of text for each value of a column."""
    rows = pa.table({"key": table[column], "bytes": text_sizes(table)})
    groups = rows.group_by("key").aggregate([("bytes", "count"), ("bytes", "sum")]).sort_by("key").to_pylist()
    return {row["key"]: {"documents": row["bytes_count"], "bytes": row["bytes_sum"]} for row in groups}


def first_of_each(removed: pa.Table) -> list[dict[str, Any]]:
    """The first few removed documents of each stage and rule, in order."""
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    chosen = []
    for place, (stage, reason) in enumerate(
        zip(removed["stage"].to_pylist(), removed["reason"].to_pylist(), strict=True)
    ):
        rule = stage, rule_of(stage, reason)
        seen[rule] += 1
        if seen[rule] <= _SAMPLES_PER_RULE:
            chosen.append(place)
    return removed.take(pa.array(chosen, pa.int64())).to_pylist()


def rule_of(stage: str, reason: str) -> str:
    """The name of the heuristic in a reason "RULE = VALUE, limit N"; "" for other stages."""
    return reason.split(" = ")[0] if stage == "heuristics" else ""
