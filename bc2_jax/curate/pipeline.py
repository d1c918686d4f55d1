"""The pipeline, top to bottom: raw files -> OUT/documents, removed, jsonl, report.* (paper section 2.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from bc2_jax.curate import features, filtering, tasks
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.contamination import load_benchmark_ngrams
from bc2_jax.curate.copies import later_copies
from bc2_jax.curate.embedding import DocumentFrequencies, HashedNgrams
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.grouping import group
from bc2_jax.curate.inputs import plan_units
from bc2_jax.curate.near import band_edges, resolve
from bc2_jax.curate.problems import UnitReport, number_lines, problems_table
from bc2_jax.curate.report import describe, write_report
from bc2_jax.curate.stages import Stages, fingerprint
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.tasks import Run
from bc2_jax.data.text_files import TextFiles, find_text_files, modified
from bc2_jax.files import file_sha256

if TYPE_CHECKING:
    from daft import DataFrame

# Raised when a change of the code changes what a stage writes: then nothing older is reused.
FORMAT = 2
# Document frequencies are counted in so many shards, evenly spaced.
_COUNTED_SHARDS = 8


def curate(
    paths: Sequence[str], out: str, config: CurationConfig, engine: Engine, show: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Runs what is not yet done and returns the report, which is also in OUT/report.json.

    `show(stage, done, all)` is called on the way. Raises ValueError for inputs that are not files of a known kind,
    before anything is written; InUse if another process writes to OUT; OSError if what lies in OUT in the end is not
    what was written.
    """
    inputs = find_text_files(paths)
    filtering.check(config)
    out_folder = Folder(out)
    tasks.check_out(out_folder, paths)
    with out_folder.owned("--out"):
        return _run_stages(inputs, paths, out_folder, config, engine, show)


def _run_stages(
    inputs: TextFiles, paths: Sequence[str], out_folder: Folder, config: CurationConfig, engine: Engine,
    show: Callable[[str, int, int], None],
) -> dict[str, Any]:  # fmt: skip
    # ---------------------------------------------------------------- what there is to do
    units = plan_units(inputs.files, config.read)
    run = Run(out_folder / "work", out_folder, config)
    files = [(*file, modified(file.path)) for file in inputs.files]
    stages = Stages(run.work, engine, fingerprint(FORMAT, files), show)

    def settings(*names: str) -> dict[str, Any]:
        return {name: dataclasses.asdict(getattr(config, name)) for name in names}

    # ---------------------------------------------------------------- raw files -> normalised documents
    def read(folder: Folder) -> list[dict[str, Any]]:
        function = functools.partial(tasks.read, run, units)
        return stages.map("read", function, [{"name": f"{unit.index:06d}", "unit": unit.index} for unit in units])

    reports = stages.run("read", settings("read"), read)
    names = [name for report in reports for name in report["shards"]]
    if not names:
        raise ValueError(f"RAW = {list(paths)} is not valid: no document could be read; the first reasons are "
                         f"{sorted({reason for report in reports for reason in report['reasons']})[:3]}.")  # fmt: skip

    # ---------------------------------------------------------------- exact copies
    exact = functools.partial(_find_exact_copies, run, engine)
    same_ids = stages.run("exact", config.copies.exact, exact)["same_ids"]

    # ---------------------------------------------------------------- what a document tells about itself
    def filter_(folder: Folder) -> list[dict[str, Any]]:
        sketch = (
            None if config.embedding.model else HashedNgrams(config.embedding, _frequencies(run, stages, names, folder))
        )
        return stages.map("filter", functools.partial(filtering.filter_documents, run, sketch), _named(names))

    filtered = stages.run("filter", filtering.settings(config), filter_)

    # ---------------------------------------------------------------- near copies
    stages.run("near", settings("copies"), functools.partial(_find_near_copies, run, engine))

    # ---------------------------------------------------------------- overlap with benchmarks
    overlap = functools.partial(_find_overlap, run, stages, names)
    benchmarks = [file_sha256(path) for path in config.contamination.files]
    matches = stages.run("contamination", [settings("contamination"), benchmarks], overlap)

    # ---------------------------------------------------------------- near copies by dense features, clusters, weights
    dense = functools.partial(_group, run, stages, names, engine)
    model = filtering.model_state(config.embedding.model)
    topics = stages.run("dense", [settings("embedding", "clusters", "dense", "weights"), model], dense)

    # ---------------------------------------------------------------- copied paragraphs and sentences
    def spans(folder: Folder) -> int:
        results = stages.map("spans", functools.partial(tasks.find_spans, run), _named(names))
        _copied_spans(folder, config, engine)
        return sum(result["spans"] for result in results)

    stages.run("spans", settings("copies"), spans)

    # ---------------------------------------------------------------- the result
    written = _write(run, stages, names)
    tasks.check_result(run, written)
    problems = number_lines((UnitReport.from_json(report), report["file"], report["start"]) for report in reports)
    out_folder.write_table("problems.parquet", problems_table(problems), "zstd")
    facts = describe(
        _notes(same_ids, inputs.skipped), reports, problems, filtered, written, topics, matches, stages.seconds
    )
    write_report(out_folder, facts)
    return facts


def _notes(same_ids: int, skipped: Sequence[str]) -> dict[str, int]:
    notes = {"documents whose id an earlier one has": same_ids, "files that were skipped": len(skipped)}
    return notes | {f"skipped: {name}": 1 for name in skipped[:20]}


def _find_exact_copies(run: Run, engine: Engine, folder: Folder) -> dict[str, int]:
    """Decides which documents are copies; returns how many, and how many have the id of an earlier one."""
    source = run.work / "read" / "shards"
    same_ids = later_copies(_table(source, ["id_hash", "doc"]), ["id_hash"], "doc", engine).count_rows()
    copies = None
    if run.config.copies.exact:
        copies = later_copies(_table(source, ["h1", "h2", "doc"]), ["h1", "h2"], "doc", engine)
    return {"copies": _decide(copies, _table(source, ["doc", "id"]), folder), "same_ids": same_ids}


def _find_near_copies(run: Run, engine: Engine, folder: Folder) -> int:
    """Decides which documents are near copies; returns how many."""
    copies, source = None, run.work / "filter"
    if run.config.copies.near:
        edges = band_edges(_table(source / "bands", ["key", "doc"]), engine)
        signatures = _table(source / "features", ["doc", "signature"])
        copies = resolve(edges, signatures, run.config.copies.least_similarity, engine)
    return _decide(copies, _table(source / "shards", ["doc", "id"]), folder)


def _frequencies(run: Run, stages: Stages, names: Sequence[str], folder: Folder) -> DocumentFrequencies:
    """In how many documents each hashed n-gram occurs, counted in some shards."""
    spaced = np.unique(np.linspace(0, len(names) - 1, min(_COUNTED_SHARDS, len(names)), dtype=int))
    some = [names[i] for i in spaced]
    counting = [{"name": f"{name}-words", "shard": name} for name in some]
    counted = stages.map("filter", functools.partial(features.count_words, run), counting)
    files = [(folder / "frequencies").read(f"{name}.i8") for name in some]
    counts = np.sum([np.frombuffer(file, "<i8") for file in files], axis=0)
    return DocumentFrequencies(counts, sum(result["documents"] for result in counted))


def _find_overlap(run: Run, stages: Stages, names: Sequence[str], folder: Folder) -> list[list[Any]]:
    """Decides which documents hold benchmark items; returns every match (see `tasks.find_overlap`)."""
    config = run.config.contamination
    if not config.files:
        _decide(None, None, folder)
        return []
    ngrams = load_benchmark_ngrams(config.files, config)
    found = [{"name": f"{name}-counts", "shard": name} for name in names]
    counted = stages.map("contamination", functools.partial(tasks.count_overlap, run, ngrams), found)
    totals = [np.sum(counts, axis=0) for counts in zip(*(result["counts"] for result in counted), strict=True)]
    rare = ngrams.without_frequent(totals, config.max_documents)
    results = stages.map("contamination", functools.partial(tasks.find_overlap, run, rare), _named(names))
    matches = [match for result in results for match in result["matches"]]
    gone = matches if config.action == "drop" else []
    details = [f": {match[3]:.0%} of its n-grams, such as {match[4]!r}" for match in gone]
    _write_decisions([match[0] for match in gone], [match[2] for match in gone], details, folder)
    return matches


def _group(run: Run, stages: Stages, names: Sequence[str], engine: Engine, folder: Folder) -> list[dict[str, Any]]:
    """Decides which documents are near copies by dense features, writes clusters and weights; returns the topics."""
    config, shards = run.config, run.work / "filter" / "shards"
    documents = run.work / "filter" / "features"
    gone = [run.work / stage / "decisions" for stage in tasks.COPIES[:2]]
    vectors, dim = documents, config.embedding.dim
    if config.embedding.model:
        embedded = stages.map("dense", functools.partial(tasks.embed, run), _named(names))
        vectors, dim = folder / "features", embedded[0]["dim"]
    result = group(documents, vectors, gone, dim, config, engine, functools.partial(_texts, shards))
    _decide(result["copies"], _table(shards, ["doc", "id"]), folder)
    (folder / "placed").write_table("placed.parquet", result["placed"])
    return result["topics"]


def _write(run: Run, stages: Stages, names: Sequence[str]) -> list[dict[str, Any]]:
    """Writes the shards of OUT that are not there, whole, yet."""

    def write(folder: Folder) -> list[dict[str, Any]]:
        tasks.prepare_result(run.out)  # report.json goes: it says that OUT is complete
        is_written = functools.partial(tasks.is_written, run)
        return stages.map("write", functools.partial(tasks.write, run), _named(names), is_written)

    def is_intact(results: list[dict[str, Any]]) -> bool:
        return all(tasks.is_written(run, name, result) for name, result in zip(names, results, strict=True))

    clear = functools.partial(tasks.clear_result, run.out)
    return stages.run("write", run.config.jsonl, write, clear=clear, intact=is_intact)


def _table(folder: Folder, columns: list[str]) -> DataFrame:
    import daft

    return daft.read_parquet(folder.pattern(".parquet")).select(*columns)


def _named(names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"name": name} for name in names]


def _decide(copies: DataFrame | None, ids: DataFrame | None, folder: Folder) -> int:
    """Writes (doc, kept, detail): the documents to drop, with the id of what stays and what a reason adds to it.

    `copies` has (doc, first), and may have `similarity`.
    """
    from daft import col

    if copies is None or ids is None:
        return _write_decisions([], [], [], folder)
    named = copies.join(ids.select(col("doc").alias("first"), col("id").alias("kept")), on="first")
    rows = named.exclude("first", "h1", "h2").sort("doc").to_arrow()
    details = [""] * rows.num_rows
    if "similarity" in rows.column_names:
        details = [f": {share:.0%} of their shingles are the same" for share in rows["similarity"].to_pylist()]
    return _write_decisions(rows["doc"], rows["kept"], details, folder)


def _write_decisions(documents: Any, kept: Any, details: Sequence[str], folder: Folder) -> int:
    schema = pa.schema([("doc", pa.int64()), ("kept", pa.string()), ("detail", pa.string())])
    table = pa.table({"doc": documents, "kept": kept, "detail": details}, schema)
    _replace(folder / "decisions", table)
    return table.num_rows


def _replace(folder: Folder, table: pa.Table) -> None:
    """Makes a folder that has only this table."""
    folder.remove()
    folder.write_table("rows.parquet", table)


def _copied_spans(folder: Folder, config: CurationConfig, engine: Engine) -> None:
    """Writes (span): the paragraphs and sentences to cut, each but the first of its kind."""
    from daft import col, lit

    hashes = _table(folder / "hashes", ["hash", "size", "span"])
    paragraph = col("size") % lit(2) == lit(0)
    copies = [
        later_copies(hashes.where(condition), ["hash", "size"], "span", engine, least).select("span")
        for condition, least in ((paragraph, 2), (~paragraph, config.copies.sentence_copies))
    ]
    spans = copies[0].concat(copies[1]).sort("span").collect()
    _replace(folder / "copies", pa.table({"span": pa.array(spans.to_arrow()["span"], pa.int64())}))


def _texts(shards: Folder, documents: np.ndarray) -> list[str]:
    """The texts of some documents by their numbers."""
    rows = shards.select(ds.field("doc").isin(documents.tolist()), ["doc", "text"])
    found = dict(zip(rows["doc"].to_pylist(), rows["text"].to_pylist(), strict=True))
    return [found[document] for document in documents.tolist()]
