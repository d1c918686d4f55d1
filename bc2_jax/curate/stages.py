"""Stages that read the raw files and that find copies, benchmark items and copied paragraphs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from bc2_jax.curate import spans
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.contamination import (
    BenchmarkNgrams,
    Match,
    count_documents,
    find_contaminated,
    load_benchmark_ngrams,
)
from bc2_jax.curate.copies import band_edges, later_copies, resolve
from bc2_jax.curate.engine import Result, Run, Runner, Stage
from bc2_jax.curate.inputs import Unit
from bc2_jax.curate.problems import UnitReport
from bc2_jax.curate.reading import hash_texts, read_shards
from bc2_jax.curate.report import add_counts
from bc2_jax.curate.shards import (
    MOST_PARTS,
    PLACE_BITS,
    count_by,
    decisions_for,
    first_document,
    replace_table,
    shard_name,
    write_decisions,
)
from bc2_jax.curate.storage import Folder
from bc2_jax.tokenizer import file_sha256
from bc2_jax.validation import require

if TYPE_CHECKING:
    from daft import DataFrame

REASONS = {
    "near": "a similar document by MinHash",
    "contamination": "it overlaps with a benchmark item",
    "dense": "a similar document by dense features",
}
"""Stages that decide which documents the write stage drops, in order; each looks at what the ones before left."""
# A span's number is shard << SPAN_BITS | place; a shard's number is that of its first document >> PLACE_BITS.
SPAN_BITS = 30


@dataclasses.dataclass(frozen=True)
class Read(Stage):
    """Raw files -> shards of normalised documents with their numbers, languages and hashes."""

    paths: Sequence[str]
    units: Sequence[Unit]
    name = "read"

    def settings(self, config: CurationConfig) -> Any:
        return {"read": dataclasses.asdict(config.read)}

    def run(self, runner: Runner) -> list[Result]:
        reports = runner.map(self._read, [f"{unit.index:06d}" for unit in self.units])
        if not any(report["shards"] for report in reports):
            first = sorted({reason for report in reports for reason in report["reasons"]})[:3]
            raise ValueError(
                f"RAW = {list(self.paths)} is not valid: no document could be read; the first reasons are {first}."
            )
        return reports

    def _read(self, run: Run, name: str) -> Result:
        """Reads one unit of the raw files."""
        unit, folder = self.units[int(name)], run.work / self.name
        report = UnitReport(unit.index)
        names, sources, languages = [], [], []
        for part, table in enumerate(read_shards(unit, run.config.read, report)):
            legal = f"it has more than {MOST_PARTS} shards of text; split it"
            require(part < MOST_PARTS, "RAW", unit.files[0].name, legal)
            shard = shard_name(unit.index, part)
            numbers = first_document(shard) + np.arange(table.num_rows, dtype=np.int64)
            table = table.set_column(table.column_names.index("doc"), "doc", pa.array(numbers))
            id_hashes = hash_texts([name.encode() for name in table["id"].to_pylist()])
            table = table.append_column("id_hash", pa.array(id_hashes[:, 0]))
            (folder / "shards").write_table(f"{shard}.parquet", table)
            names.append(shard)
            sources.append(count_by(table, "source"))
            languages.append(count_by(table, "language"))
        return report.to_json() | {
            "shards": names,
            "file": unit.files[0].name,
            "start": unit.start,
            "sources": add_counts(sources),
            "languages": add_counts(languages),
        }


class ExactCopies(Stage):
    """Decides which documents are exact copies of an earlier one; counts ids that occur twice."""

    name = "exact"

    def settings(self, config: CurationConfig) -> Any:
        return config.copies.exact

    def run(self, runner: Runner) -> dict[str, int]:
        shards, engine, copies = "read/shards", runner.engine, None
        same_ids = later_copies(runner.table(shards, ["id_hash", "doc"]), ["id_hash"], "doc", engine).count_rows()
        if runner.config.copies.exact:
            copies = later_copies(runner.table(shards, ["h1", "h2", "doc"]), ["h1", "h2"], "doc", engine)
        return {"copies": decide(copies, runner.table(shards, ["doc", "id"]), runner.folder), "same_ids": same_ids}


class NearCopies(Stage):
    """Decides which documents are near copies of an earlier one by MinHash."""

    name = "near"

    def settings(self, config: CurationConfig) -> Any:
        return {"copies": dataclasses.asdict(config.copies)}

    def run(self, runner: Runner) -> int:
        copies = None
        if runner.config.copies.near:
            edges = band_edges(runner.table("filter/bands", ["key", "doc"]), runner.engine)
            signatures = runner.table("filter/features", ["doc", "signature"])
            copies = resolve(edges, signatures, runner.config.copies.least_similarity, runner.engine)
        return decide(copies, runner.table("filter/shards", ["doc", "id"]), runner.folder)


class Contamination(Stage):
    """Decides which documents hold benchmark items; its result has every match (see `_find`)."""

    name = "contamination"

    def settings(self, config: CurationConfig) -> Any:
        benchmarks = [file_sha256(path) for path in config.contamination.files]
        return [{"contamination": dataclasses.asdict(config.contamination)}, benchmarks]

    def run(self, runner: Runner) -> list[list[Any]]:
        config = runner.config.contamination
        if not config.files:
            write_decisions([], [], [], runner.folder)
            return []
        ngrams = load_benchmark_ngrams(config.files, config)
        counted = runner.map(functools.partial(self._count, ngrams), runner.shards, suffix="-counts")
        totals = [np.sum(counts, axis=0) for counts in zip(*(result["counts"] for result in counted), strict=True)]
        rare = ngrams.without_frequent(totals, config.max_documents)
        results = runner.map(functools.partial(self._find, rare), runner.shards)
        matches = [match for result in results for match in result["matches"]]
        gone = matches if config.action == "drop" else []
        details = [f": {match[3]:.0%} of its n-grams, such as {match[4]!r}" for match in gone]
        write_decisions([match[0] for match in gone], [match[2] for match in gone], details, runner.folder)
        return matches

    @staticmethod
    def _count(ngrams: BenchmarkNgrams, run: Run, name: str) -> Result:
        """In how many documents of a shard each n-gram of the benchmarks occurs."""
        texts = survivors(run, name, ["doc", "text"], ["near"])["text"].to_pylist()
        return {"counts": [counts.tolist() for counts in count_documents(texts, ngrams)]}

    @staticmethod
    def _find(ngrams: BenchmarkNgrams, run: Run, name: str) -> Result:
        """[doc, id, item, share, n-gram] of each document that shares n-grams: the item with the largest share."""
        table = survivors(run, name, ["doc", "id", "text"], ["near"])
        best: dict[int, Match] = {}
        for match in find_contaminated(table["text"].to_pylist(), ngrams, run.config.contamination.min_share):
            if match.document not in best or match.share > best[match.document].share:
                best[match.document] = match
        docs, ids = table["doc"].to_pylist(), table["id"].to_pylist()
        return {"matches": [[docs[place], ids[place], *match[1:]] for place, match in sorted(best.items())]}


class CopiedSpans(Stage):
    """Decides which paragraphs and sentences are copies of earlier ones."""

    name = "spans"

    def settings(self, config: CurationConfig) -> Any:
        return {"copies": dataclasses.asdict(config.copies)}

    def run(self, runner: Runner) -> int:
        results = runner.map(self._list, runner.shards)
        replace_table(runner.folder / "copies", self._copies(runner))
        return sum(result["spans"] for result in results)

    def _list(self, run: Run, name: str) -> Result:
        """Lists the paragraphs and sentences of a shard."""
        config, folder = run.config.copies, run.work / self.name
        table = survivors(run, name, ["doc", "text", "language"], list(REASONS))
        cuttable = np.flatnonzero(~np.isin(table["language"].to_numpy(), config.whole_languages))
        texts = table["text"].take(pa.array(cuttable)).to_pylist()
        found = spans.find_spans(texts, config.shortest_paragraph, config.shortest_sentence)
        shard = first_document(name) >> PLACE_BITS
        numbers = (np.int64(shard) << SPAN_BITS) + np.arange(len(found.hash), dtype=np.int64)
        # Sorted, so that a range of hashes is a range of row groups.
        order = np.argsort(found.hash, kind="stable")
        size = (found.stop - found.start).astype(np.int64)
        hashes = pa.table({"hash": found.hash[order], "size": (size * 2 + found.kind)[order], "span": numbers[order]})
        (folder / "hashes").write_table(f"{name}.parquet", hashes)
        places = {"row": cuttable[found.document].astype(np.int32), "start": found.start, "stop": found.stop}
        (folder / "places").write_table(f"{name}.parquet", pa.table(places))
        return {"spans": len(numbers)}

    @staticmethod
    def _copies(runner: Runner) -> pa.Table:
        """(span): the paragraphs and sentences to cut, all but the first of each group of copies."""
        from daft import col, lit

        hashes = runner.table("spans/hashes", ["hash", "size", "span"])
        is_paragraph = col("size") % lit(2) == lit(spans.PARAGRAPH)
        copies = [
            later_copies(hashes.where(condition), ["hash", "size"], "span", runner.engine, least).select("span")
            for condition, least in ((is_paragraph, 2), (~is_paragraph, runner.config.copies.sentence_copies))
        ]
        found = copies[0].concat(copies[1]).sort("span").collect()
        return pa.table({"span": pa.array(found.to_arrow()["span"], pa.int64())})


def decide(copies: DataFrame | None, ids: DataFrame, folder: Folder) -> int:
    """Writes decisions to drop `copies` (doc, first[, similarity]); None drops nothing. Returns their number."""
    from daft import col

    if copies is None:
        return write_decisions([], [], [], folder)
    named = copies.join(ids.select(col("doc").alias("first"), col("id").alias("kept")), on="first")
    rows = named.exclude("first", "h1", "h2").sort("doc").to_arrow()
    details = [""] * rows.num_rows
    if "similarity" in rows.column_names:
        details = [f": {share:.0%} of their shingles are the same" for share in rows["similarity"].to_pylist()]
    return write_decisions(rows["doc"], rows["kept"], details, folder)


def survivors(
    run: Run, name: str, columns: list[str], stages: Sequence[str], folder: Literal["shards", "features"] = "shards"
) -> pa.Table:
    """The documents of a shard that some stages did not decide to drop; `columns` of filter/`folder`, with "doc"."""
    table = (run.work / "filter" / folder).read_table(f"{name}.parquet", columns)
    gone = [decisions_for(run.work / stage / "decisions", name)["doc"].to_numpy() for stage in stages]
    return table.filter(pa.array(~np.isin(table["doc"].to_numpy(), np.concatenate(gone))))
