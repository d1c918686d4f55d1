"""The pipeline as a list of stages: raw files -> OUT/documents, removed, jsonl, report.* (paper section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bc2_jax.curate.config import CurationConfig
from bc2_jax.curate.dense import DenseCopies
from bc2_jax.curate.engine import Engine, Run, Runner, Stage
from bc2_jax.curate.filtering import (
    Block,
    CutBoilerplate,
    CutSentences,
    Filter,
    Heuristics,
    MaskPersonalData,
    Quality,
    Safety,
    Spam,
    check_files,
)
from bc2_jax.curate.inputs import Unit, plan_units
from bc2_jax.curate.problems import UnitReport, number_lines, problems_table
from bc2_jax.curate.report import describe, write_report
from bc2_jax.curate.stages import Contamination, CopiedSpans, ExactCopies, NearCopies, Read
from bc2_jax.curate.storage import Folder
from bc2_jax.curate.writing import Write, check_out, check_result
from bc2_jax.data.text_files import find_text_files, modified
from bc2_jax.files import fingerprint

# Raised when a change of the code changes what a stage writes, so that no earlier result is reused.
FORMAT = 2


def make_stages(paths: Sequence[str], units: Sequence[Unit], config: CurationConfig) -> list[Stage]:
    """The stages in order."""
    return [
        Read(paths, units),
        ExactCopies(),
        Filter(make_blocks(config)),
        NearCopies(),
        Contamination(),
        DenseCopies(),
        CopiedSpans(),
        Write(),
    ]


def make_blocks(config: CurationConfig) -> list[Block]:
    """The blocks of the filter stage in order; each judges a document by itself."""
    return [
        MaskPersonalData(config.privacy),
        CutBoilerplate(config.boilerplate),
        Heuristics(config.heuristics),
        Spam(config.spam),
        Quality(config.quality),
        Safety(config.safety),
        CutSentences(config.sentences),
    ]


def curate(
    paths: Sequence[str], out: str, config: CurationConfig, engine: Engine, show: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Runs the stages that are not finished and returns the report, which is also in OUT/report.json.

    `show(stage, done, total)` is called as tasks finish. Raises ValueError for inputs that are not files of a known
    kind, before anything is written; InUse if another process writes to OUT; OSError if the files in OUT are not what
    was written.
    """
    inputs = find_text_files(paths)
    check_files(config)
    out_folder = Folder(out)
    check_out(out_folder, paths)
    with out_folder.owned("--out"):
        units = plan_units(inputs.files, config.read)
        key = fingerprint([FORMAT, [(*file, modified(file.path)) for file in inputs.files]])[:32]
        runner = Runner(Run(out_folder / "work", out_folder, config), engine, key, show)
        for stage in make_stages(paths, units, config):
            runner.execute(stage)
        return _finish(runner, inputs.skipped)


def _finish(runner: Runner, skipped: Sequence[str]) -> dict[str, Any]:
    """Checks the result, writes problems.parquet and the report, and returns the report."""
    out, results = runner.run.out, runner.results
    check_result(out, results["write"])
    reports = results["read"]
    problems = number_lines((UnitReport.from_json(report), report["file"], report["start"]) for report in reports)
    out.write_table("problems.parquet", problems_table(problems), "zstd")
    notes = {
        "documents whose id an earlier one has": results["exact"]["same_ids"],
        "files that were skipped": len(skipped),
    } | {f"skipped: {name}": 1 for name in skipped[:20]}
    facts = describe(results, problems, notes, runner.seconds)
    write_report(out, facts)
    return facts
