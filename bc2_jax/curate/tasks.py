"""What happens to one shard: functions that read files, write files and return counts, in the order of the pipeline.

Each takes the run, which is pickled to where the task runs, and a task: the shard's name and little else.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bc2_jax.curate import spans
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.contamination import BenchmarkNgrams, Match, count_documents, find_contaminated
from bc2_jax.curate.embedding import HiddenStates
from bc2_jax.curate.engine import Task
from bc2_jax.curate.inputs import Unit
from bc2_jax.curate.problems import UnitReport
from bc2_jax.curate.reading import hash_texts, read_shards
from bc2_jax.curate.report import add_counts
from bc2_jax.curate.shards import (
    MOST_PARTS,
    Account,
    binary_rows,
    count_by,
    decisions_for,
    first_document,
    first_of_each,
    shard_name,
)
from bc2_jax.curate.storage import Folder
from bc2_jax.validation import require

# Stages that decide which documents go, in the order in which they look at what the one before left.
COPIES = ("near", "contamination", "dense")
REASONS = {
    "near": "a similar document by MinHash",
    "contamination": "it overlaps with a benchmark item",
    "dense": "a similar document by dense features",
}
_COPIED = "a paragraph or a sentence that stands in an earlier place"
# In OUT: what was cut out of documents that stay. A reader of the folder removed/ skips names with an underscore.
_CUTS = "removed/_cuts"
# A span is numbered shard << SPAN_BITS | place, where a shard is its first document's number >> 20.
SPAN_BITS = 30
_DOCUMENT_BITS = 20


# The report first, which says that the rest is complete.
_WRITTEN = (
    "report.json", "report.md", "waterfall.png", "problems.parquet", "documents", "removed", "jsonl", "work",
)  # fmt: skip


_SHARD_FILE = re.compile(r"\d{6}-\d{4}\.(?:parquet|jsonl\.zst)")


@dataclasses.dataclass(frozen=True)
class Run:
    """What every task knows."""

    work: Folder
    """Folder of the stages."""
    out: Folder
    """Folder of the result."""
    config: CurationConfig


def read(run: Run, units: Sequence[Unit], task: Task) -> Task:
    """Reads one unit of the raw files; its documents get their numbers."""
    unit, folder = units[task["unit"]], run.work / "read"
    report = UnitReport(unit.index)
    names, sources, languages = [], [], []
    for part, table in enumerate(read_shards(unit, run.config.read, report)):
        require(part < MOST_PARTS, "RAW", unit.files[0].name, f"it has more than {MOST_PARTS} shards of text; split it")
        name = shard_name(unit.index, part)
        numbers = first_document(name) + np.arange(table.num_rows, dtype=np.int64)
        table = table.set_column(table.column_names.index("doc"), "doc", pa.array(numbers))
        id_hashes = hash_texts([name.encode() for name in table["id"].to_pylist()])
        table = table.append_column("id_hash", pa.array(id_hashes[:, 0]))
        (folder / "shards").write_table(f"{name}.parquet", table)
        names.append(name)
        sources.append(count_by(table, "source"))
        languages.append(count_by(table, "language"))
    return report.to_json() | {
        "shards": names,
        "file": unit.files[0].name,
        "start": unit.start,
        "sources": add_counts(sources),
        "languages": add_counts(languages),
    }


def find_spans(run: Run, task: Task) -> Task:
    """Lists the paragraphs and sentences that could be copies of others."""
    config, name = run.config.copies, task["name"]
    table = _survivors(run, name, ["doc", "text", "language"], COPIES)
    looked_at = np.flatnonzero(~np.isin(table["language"].to_numpy(), config.whole_languages))
    texts = table["text"].take(pa.array(looked_at)).to_pylist()
    found = spans.find_spans(texts, config.shortest_paragraph, config.shortest_sentence)
    shard = first_document(name) >> _DOCUMENT_BITS
    numbers = (np.int64(shard) << SPAN_BITS) + np.arange(len(found.hash), dtype=np.int64)
    # Sorted, so that a range of hashes is a range of row groups.
    order = np.argsort(found.hash, kind="stable")
    size = (found.stop - found.start).astype(np.int64)
    hashes = pa.table({"hash": found.hash[order], "size": (size * 2 + found.kind)[order], "span": numbers[order]})
    (run.work / "spans" / "hashes").write_table(f"{name}.parquet", hashes)
    places = {"row": looked_at[found.document].astype(np.int32), "start": found.start, "stop": found.stop}
    (run.work / "spans" / "places").write_table(f"{name}.parquet", pa.table(places))
    return {"spans": len(numbers)}


def embed(run: Run, task: Task) -> Task:
    """Dense features by a model, of what near copies and benchmarks left."""
    table = _survivors(run, task["name"], ["doc", "text"], COPIES[:2])
    features = HiddenStates(run.config.embedding)(table["text"].to_pylist())
    columns = pa.table({"doc": table["doc"], "feature": binary_rows(features)})
    (run.work / "dense" / "features").write_table(f"{task['name']}.parquet", columns)
    return {"dim": features.shape[1]}


def count_overlap(run: Run, ngrams: BenchmarkNgrams, task: Task) -> Task:
    """In how many documents each n-gram of the benchmarks occurs."""
    texts = _survivors(run, task["shard"], ["doc", "text"], COPIES[:1])["text"].to_pylist()
    return {"counts": [counts.tolist() for counts in count_documents(texts, ngrams)]}


def find_overlap(run: Run, ngrams: BenchmarkNgrams, task: Task) -> Task:
    """Which documents share n-grams with which items of the benchmarks: the item with the largest share of each."""
    table = _survivors(run, task["name"], ["doc", "id", "text"], COPIES[:1])
    best: dict[int, Match] = {}
    for match in find_contaminated(table["text"].to_pylist(), ngrams, run.config.contamination.min_share):
        if match.document not in best or match.share > best[match.document].share:
            best[match.document] = match
    docs, ids = table["doc"].to_pylist(), table["id"].to_pylist()
    return {"matches": [[docs[place], ids[place], *match[1:]] for place, match in sorted(best.items())]}


def write(run: Run, task: Task) -> Task:
    """The finished documents of a shard, and all that its raw documents lost on the way."""
    name = task["name"]
    table = (run.work / "filter" / "shards").read_table(f"{name}.parquet")
    account = Account(table)
    for stage in COPIES:
        decisions = decisions_for(run.work / stage / "decisions", name)
        table = account.drop_copies(table, stage, decisions, REASONS[stage])
    placed = decisions_for(run.work / "dense" / "placed", name)
    assert placed["doc"].equals(table["doc"]), f"{name}: not every document has a cluster"
    table = table.append_column("cluster", placed["cluster"]).append_column("weight", placed["weight"])
    table, cut = _cut_spans(run, name, table, account)
    documents = table.select(["id", "text", "source", "language", "cluster", "score", "weight"]).combine_chunks()
    if documents.num_rows:
        (run.out / "documents").write_table(f"{name}.parquet", documents, "zstd")
        if run.config.jsonl:
            (run.out / "jsonl").write(f"{name}.jsonl.zst", _jsonl(documents))
    earlier = (run.work / "filter" / "removed").read_table(f"{name}.parquet")
    removed = pa.concat_tables([earlier, account.removed]).sort_by("doc").combine_chunks()
    if removed.num_rows:
        (run.out / "removed").write_table(f"{name}.parquet", removed, "zstd")
    cuts = pa.concat_tables([(run.work / "filter" / "cuts").read_table(f"{name}.parquet"), account.cuts])
    if cuts.num_rows:
        (run.out / _CUTS).write_table(f"{name}.parquet", cuts.sort_by("doc").combine_chunks(), "zstd")
    return account.result(table) | {
        "gone": removed.num_rows,
        "cuts": cuts.num_rows,
        "cut_spans": cut,
        "sources": count_by(documents, "source"),
        "languages": count_by(documents, "language"),
        "samples": first_of_each(removed),
    }


def _cut_spans(run: Run, name: str, table: pa.Table, account: Account) -> tuple[pa.Table, int]:
    """Cuts copied paragraphs and sentences out of the texts, and drops documents of which too little is left."""
    config = run.config.copies
    copies = decisions_for(run.work / "spans" / "copies", name, "span", SPAN_BITS - _DOCUMENT_BITS)
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
    # A document that lost most of itself is not worth the rest.
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
    """Raises ValueError if OUT holds what no curation wrote, or lies in one of the raw folders."""
    found = out.entries()
    foreign = [name for name in found if name not in _WRITTEN]
    own = not found or "work" in found or "report.json" in found
    legal = "it must be an empty folder or one of an earlier run"
    for name in (*_WRITTEN[4:7], _CUTS):
        inside = [f"{name}/{entry}" for entry in (out / name).entries()]
        foreign += [path for path in inside if path != _CUTS and not _SHARD_FILE.fullmatch(path.rpartition("/")[2])]
    require(own and not foreign, "--out", out.location, f"{legal}, and has {(foreign or found or [''])[0]}")
    for raw in paths:
        is_in_raw = "://" not in raw and Path(out.location).resolve().is_relative_to(Path(raw).resolve())
        require(not is_in_raw, "--out", out.location, f"it must not lie in the raw folder {raw}")


def prepare_result(out: Folder) -> None:
    """Removes what says that the result is complete, report.json first, and the unfinished files of a killed run."""
    for name in _WRITTEN[:4]:
        out.delete(name)
    for name in (*_WRITTEN[4:7], _CUTS):
        (out / name).remove_unfinished()


def clear_result(out: Folder) -> None:
    """Removes what an earlier run with other settings wrote."""
    prepare_result(out)
    for name in _WRITTEN[4:7]:
        (out / name).remove()


def is_written(run: Run, name: str, result: Task) -> bool:
    """Whether the files of a shard that `write` counted in `result` are there, whole."""
    files = [
        ("documents", f"{name}.parquet", result["after"]["documents"]),
        ("removed", f"{name}.parquet", result["gone"]),
        (_CUTS, f"{name}.parquet", result["cuts"]),
    ]
    if run.config.jsonl:
        files.append(("jsonl", f"{name}.jsonl.zst", result["after"]["documents"]))
    return all(
        (run.out / folder).exists(file) == bool(rows)
        and (not rows or folder == "jsonl" or (run.out / folder).rows(file) == rows)
        for folder, file, rows in files
    )


def check_result(run: Run, results: Sequence[Task]) -> None:
    """Counts what lies in OUT. Raises OSError if that is not what the results of `write` say."""
    for folder, rows in (
        ("documents", sum(result["after"]["documents"] for result in results)),
        ("removed", sum(result["gone"] for result in results)),
        (_CUTS, sum(result["cuts"] for result in results)),
    ):
        found = (run.out / folder).rows()
        if found != rows:
            place = f"{run.out.location}/{folder}"
            raise OSError(
                f"{place} has {found} documents where {rows} were written: something else wrote or deleted there. "
                "Remove what is not of this run and run the same command again."
            )


def _survivors(run: Run, name: str, columns: list[str], stages: Sequence[str]) -> pa.Table:
    """What some stages left of a shard."""
    table = (run.work / "filter" / "shards").read_table(f"{name}.parquet", columns)
    gone = [decisions_for(run.work / stage / "decisions", name)["doc"].to_numpy() for stage in stages]
    return table.filter(pa.array(~np.isin(table["doc"].to_numpy(), np.concatenate(gone))))


def _jsonl(table: pa.Table) -> bytes:
    """One object a line, compressed."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    parts = []
    # Cut by rows alone: how a file is read into chunks must not show in the bytes.
    for start in range(0, table.num_rows, 256):
        lines = [json.dumps(row, ensure_ascii=False) for row in table.slice(start, 256).to_pylist()]
        parts.append(compressor.compress("".join(f"{line}\n" for line in lines).encode()))
    return b"".join([*parts, compressor.flush()])
