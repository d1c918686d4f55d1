"""The write stage: the finished documents, all that was removed, and the checks of the folder OUT."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bc2_jax.curate import spans
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Result, Run, Runner, Stage
from bc2_jax.curate.shards import PLACE_BITS, Account, count_by, decisions_for, first_of_each
from bc2_jax.curate.stages import REASONS, SPAN_BITS
from bc2_jax.curate.storage import Folder
from bc2_jax.validation import require

_COPIED = "a paragraph or a sentence that stands in an earlier place"
# What was cut out of documents that stay. A reader of the folder removed/ skips names with an underscore.
_CUTS = "removed/_cuts"
# What a run writes to OUT. report.json is deleted first and written last: it says that the rest is complete.
_FILES = ("report.json", "report.md", "waterfall.png", "problems.parquet")
_FOLDERS = ("documents", "removed", "jsonl")
_SHARD_FILE = re.compile(r"\d{6}-\d{4}\.(?:parquet|jsonl\.zst)")
_ROWS_PER_FRAME = 256


class Write(Stage):
    """Drops near copies, benchmark items and copied paragraphs, and writes the result to OUT."""

    name = "write"

    def settings(self, config: CurationConfig) -> Any:
        return config.jsonl

    def run(self, runner: Runner) -> list[Result]:
        _delete_reports(runner.run.out)
        return runner.map(self._write, runner.shards, is_intact=_is_written)

    def clear(self, run: Run) -> None:
        _delete_reports(run.out)
        for name in _FOLDERS:
            (run.out / name).remove()

    def is_intact(self, runner: Runner, result: list[Result]) -> bool:
        return all(_is_written(runner.run, *shard) for shard in zip(runner.shards, result, strict=True))

    def _write(self, run: Run, name: str) -> Result:
        """Writes the documents of a shard, and all that its raw documents lost in the run."""
        table = (run.work / "filter" / "shards").read_table(f"{name}.parquet")
        account = Account(table)
        for stage, reason in REASONS.items():
            table = account.drop_copies(table, stage, decisions_for(run.work / stage / "decisions", name), reason)
        placed = decisions_for(run.work / "dense" / "placed", name)
        assert placed["doc"].equals(table["doc"]), f"{name}: not every document has a cluster"
        table = table.append_column("cluster", placed["cluster"]).append_column("weight", placed["weight"])
        table, cut = _cut_copies(run, name, table, account)
        documents = table.select(["id", "text", "source", "language", "cluster", "score", "weight"]).combine_chunks()
        earlier = run.work / "filter"
        removed = _joined(earlier / "removed", name, account.removed)
        cuts = _joined(earlier / "cuts", name, account.cuts)
        for folder, rows in (("documents", documents), ("removed", removed), (_CUTS, cuts)):
            if rows.num_rows:
                (run.out / folder).write_table(f"{name}.parquet", rows, "zstd")
        if run.config.jsonl and documents.num_rows:
            (run.out / "jsonl").write(f"{name}.jsonl.zst", _jsonl(documents))
        return account.result(table) | {
            "gone": removed.num_rows,
            "cuts": cuts.num_rows,
            "cut_spans": cut,
            "sources": count_by(documents, "source"),
            "languages": count_by(documents, "language"),
            "samples": first_of_each(removed),
        }


def _cut_copies(run: Run, name: str, table: pa.Table, account: Account) -> tuple[pa.Table, int]:
    """Cuts copied paragraphs and sentences out of the texts, and drops documents of which too little is left.

    Returns the table and the number of pieces cut.
    """
    config = run.config.copies
    copies = decisions_for(run.work / "spans" / "copies", name, "span", SPAN_BITS - PLACE_BITS)
    places = (run.work / "spans" / "places").read_table(f"{name}.parquet")
    wanted = copies["span"].to_numpy() & ((1 << SPAN_BITS) - 1)
    row, start, stop = (places[column].to_numpy()[wanted] for column in ("row", "start", "stop"))
    rows, first = np.unique(row, return_index=True)
    bounds = np.append(first, len(row))
    texts = table["text"].take(pa.array(rows)).to_pylist()
    shorter = [
        spans.cut_spans(text, start[low:high].tolist(), stop[low:high].tolist())
        for text, low, high in zip(texts, bounds[:-1], bounds[1:], strict=True)
    ]
    mask = np.zeros(table.num_rows, bool)
    mask[rows] = True
    text = pc.replace_with_mask(table["text"].combine_chunks(), pa.array(mask), pa.array(shorter, pa.large_string()))
    before, after = pc.binary_length(table["text"]).to_numpy(), pc.binary_length(text).to_numpy()
    lost = mask & (after < np.maximum(before * config.least_left, config.least_left_bytes))
    gone = np.flatnonzero(lost)
    account.note(table, "spans", gone, [f"{after[i]} of {before[i]} bytes are no copies" for i in gone])
    account.count("spans", 0, int((before - after)[mask & ~lost].sum()))
    some = [(k, n) for k, row in enumerate(rows) if not lost[row] for n in range(bounds[k], bounds[k + 1])]
    pieces = [texts[k][start[n] : stop[n]] for k, n in some]
    account.note_cuts(table, "spans", [rows[k] for k, _ in some], [_COPIED] * len(some), pieces)
    table = table.set_column(table.column_names.index("text"), "text", text)
    return table.filter(pa.array(~lost)), len(row)


def check_out(out: Folder, paths: Sequence[str]) -> None:
    """Raises ValueError if OUT has files that no curation wrote, or lies in one of the raw folders."""
    found = out.entries()
    foreign = [name for name in found if name not in (*_FILES, *_FOLDERS, "work")]
    own = not found or "work" in found or "report.json" in found
    legal = "it must be an empty folder or one of an earlier run"
    for name in (*_FOLDERS, _CUTS):
        inside = [f"{name}/{entry}" for entry in (out / name).entries()]
        foreign += [path for path in inside if path != _CUTS and not _SHARD_FILE.fullmatch(path.rpartition("/")[2])]
    require(own and not foreign, "--out", out.location, f"{legal}, and has {(foreign or found or [''])[0]}")
    for raw in paths:
        is_in_raw = "://" not in raw and Path(out.location).resolve().is_relative_to(Path(raw).resolve())
        require(not is_in_raw, "--out", out.location, f"it must not lie in the raw folder {raw}")


def check_result(out: Folder, results: Sequence[Result]) -> None:
    """Raises OSError if the files in OUT do not have the rows that `Write` counted in `results`."""
    for folder, rows in (
        ("documents", sum(result["after"]["documents"] for result in results)),
        ("removed", sum(result["gone"] for result in results)),
        (_CUTS, sum(result["cuts"] for result in results)),
    ):
        found = (out / folder).rows()
        if found != rows:
            raise OSError(
                f"{out.location}/{folder} has {found} documents where {rows} were written: something else wrote or "
                "deleted there. Remove what is not of this run and run the same command again."
            )


def _delete_reports(out: Folder) -> None:
    """Deletes the files that say that the result is complete, and the temporary files of a killed run."""
    for name in _FILES:
        out.delete(name)
    for name in (*_FOLDERS, _CUTS):
        (out / name).remove_unfinished()


def _is_written(run: Run, name: str, result: Result) -> bool:
    """Whether the files of a shard that `Write` counted in `result` exist, with all their rows."""
    documents = result["after"]["documents"]
    files = [("documents", documents), ("removed", result["gone"]), (_CUTS, result["cuts"])]
    return all(
        (run.out / folder).exists(f"{name}.parquet") == bool(rows)
        and (not rows or (run.out / folder).rows(f"{name}.parquet") == rows)
        for folder, rows in files
    ) and (not run.config.jsonl or (run.out / "jsonl").exists(f"{name}.jsonl.zst") == bool(documents))


def _joined(folder: Folder, name: str, added: pa.Table) -> pa.Table:
    """The rows that the filter stage wrote for a shard and `added`, in the order of documents."""
    return pa.concat_tables([folder.read_table(f"{name}.parquet"), added]).sort_by("doc").combine_chunks()


def _jsonl(table: pa.Table) -> bytes:
    """One JSON object a line, compressed with zstd."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    parts = []
    # Cut by rows alone, so that the bytes do not depend on how the table is chunked.
    for start in range(0, table.num_rows, _ROWS_PER_FRAME):
        lines = [json.dumps(row, ensure_ascii=False) for row in table.slice(start, _ROWS_PER_FRAME).to_pylist()]
        parts.append(compressor.compress("".join(f"{line}\n" for line in lines).encode()))
    return b"".join([*parts, compressor.flush()])
