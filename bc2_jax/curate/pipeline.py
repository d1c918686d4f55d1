"""The pipeline, top to bottom: raw files -> OUT/documents, OUT/removed, OUT/jsonl, OUT/report.* (paper section 2.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bc2_jax.curate import tasks
from bc2_jax.curate.copies import later_copies
from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.engine import Engine

from bc2_jax.curate.near import band_edges, resolve
from bc2_jax.curate.stages import Stages, fingerprint
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.tasks import Run

if TYPE_CHECKING:
    from daft import DataFrame

# Raised when a change of the code changes what a stage writes: then nothing older is reused.
FORMAT = 1


def curate(
    paths: Sequence[str], out: str, config: CurationConfig, engine: Engine, show: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Runs what is not yet done and returns the report, which is also in OUT/report.json.

    `show(stage, done, all)` is called on the way. Raises ValueError for inputs that are no files of a known kind,
    before anything is written.
    """
    inputs = find_inputs(paths)
    units = plan_units(inputs.files, config.read)
    run = Run(Folder(out) / "work", Folder(out), config)
    files = [(file.path, file.size, file.modified) for file in inputs.files]
    stages = Stages(run.work, engine, fingerprint(FORMAT, files), show)

    def setting(*names: str) -> dict[str, Any]:
        return {name: dataclasses.asdict(getattr(config, name)) for name in names}

    def per_shard(stage: str, function: Callable[[Run, dict], dict], names: Sequence[str]) -> list[dict]:
        return stages.map(stage, functools.partial(function, run), [{"name": name} for name in names])

    # ---------------------------------------------------------------- raw files -> normalised documents
    def read(folder: Folder) -> dict[str, Any]:
        found = [{"name": f"{unit.index:06d}", "unit": dataclasses.asdict(unit)} for unit in units]
        reports = stages.map("read", functools.partial(tasks.read, run), found)
        return {"units": reports, "shards": [name for report in reports for name in report["shards"]]}

    read_result = stages.run("read", setting("read"), read)
    names = read_result["shards"]

    # ---------------------------------------------------------------- exact copies
    def exact(folder: Folder) -> dict[str, Any]:
        rows = _table(run.work / "read" / "shards", ["h1", "h2", "doc"])
        copies = later_copies(rows, ["h1", "h2"], "doc", engine).select("doc", "first")
        return _decide(copies, _table(run.work / "read" / "shards", ["doc", "id"]), folder)

    stages.run("exact", None, exact)

    # ---------------------------------------------------------------- what one document tells about itself
    filtered = stages.run(
        "filter", config.filter_settings(), lambda folder: per_shard("filter", tasks.filter_documents, names)
    )

    # ---------------------------------------------------------------- copied paragraphs and sentences
    def spans(folder: Folder) -> dict[str, Any]:
        results = per_shard("spans", tasks.find_spans, names)
        _copied_spans(folder, config, engine)
        return {"spans": sum(result["spans"] for result in results)}

    stages.run("spans", setting("copies"), spans)
    cut = stages.run("cut", None, lambda folder: per_shard("cut", tasks.cut_spans, names))

    # ---------------------------------------------------------------- near copies
    def near(folder: Folder) -> dict[str, Any]:
        per_shard("near", tasks.sign, names)
        signatures = _table(folder / "signatures", ["doc", "signature"])
        edges = band_edges(_table(folder / "bands", ["key", "doc"]), engine)
        copies = resolve(edges, signatures, config.copies.least_similarity, engine)
        return _decide(copies, _table(run.work / "cut" / "shards", ["doc", "id"]), folder)

    stages.run("near", None, near)
    return {"read": read_result, "filter": filtered, "cut": cut}


def _table(folder: Folder, columns: list[str]) -> DataFrame:
    import daft

    return daft.read_parquet(folder.uri("*.parquet")).select(*columns)


def _decide(copies: DataFrame, ids: DataFrame, folder: Folder) -> dict[str, Any]:
    """Writes (doc, kept): the documents to drop, with the id of what stays; `copies` has (doc, first)."""
    from daft import col

    named = copies.join(ids.select(col("doc").alias("first"), col("id").alias("kept")), on="first")
    named = named.select("doc", "kept").sort("doc").collect()
    named.write_parquet((folder / "decisions").location, write_mode="overwrite")
    return {"documents": named.count_rows()}


def _copied_spans(folder: Folder, config: CurationConfig, engine: Engine) -> None:
    """Writes (span): the paragraphs and sentences to cut, each but the first of its kind."""
    from daft import col

    hashes = _table(folder / "hashes", ["hash", "size", "span"])
    paragraph = col("size") % 2 == 0
    copies = [
        later_copies(hashes.where(condition), ["hash", "size"], "span", engine, least).select("span")
        for condition, least in ((paragraph, 2), (~paragraph, config.copies.sentence_copies))
    ]
    copies[0].concat(copies[1]).sort("span").write_parquet((folder / "copies").location, write_mode="overwrite")
