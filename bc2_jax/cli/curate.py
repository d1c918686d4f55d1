"""Raw text -> clean, deduplicated, weighted documents.

    bc2 curate RAW... --out DIR [--config default] [--runner ray] [--FIELD VALUE]

RAW are files or folders of .jsonl, .json and .txt (plain, .zst, .gz) and .parquet; a row needs a field `text`. DIR gets
documents/*.parquet and jsonl/*.jsonl.zst (id, text, source, language, cluster, score, weight), removed/*.parquet (what
went, and why), problems.parquet (what could not be read), report.md, report.json and waterfall.png. Started again with
the same arguments it resumes where it stopped; DIR/work may be deleted when it is done.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from bc2_jax.cli.configs import curation_configs, list_configs
from bc2_jax.config.file import read_config_file
from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.curate.config import CurationConfig
from bc2_jax.data.processes import ends_at_signals
from bc2_jax.terminal import make_console, make_table, use_utf8
from bc2_jax.validation import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    raw: tyro.conf.Positional[tuple[str, ...]]
    """Raw files and folders, on a disk or as gs:// and s3:// URIs."""
    out: str
    """Folder to make, or to resume."""
    config: str | None = None
    """A Python file with `def config() -> CurationConfig`, or the name of one that `bc2 curate --list` lists."""
    runner: str = "native"
    """Where it runs: native (this process), ray (a cluster started on this machine) or ray://HOST:PORT."""
    encoding: str | None = None
    """What --read.encoding says: the encoding of files that are not UTF-8, such as gb18030 or utf-16."""
    settings: Annotated[CurationConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CurationConfig)


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Fields of the configuration are changed as in `bc2 train`, on top of those of --config."""
    settings = CurationConfig()
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            path = value or (arguments[place + 1] if place + 1 < len(arguments) else "")
            settings = read_config_file(path, CurationConfig).config
    options = tyro.cli(Arguments, args=list(arguments), default=Arguments(raw=(), out="", settings=settings))
    if options.encoding is None:
        return options
    read = dataclasses.replace(options.settings.read, encoding=options.encoding)
    return dataclasses.replace(options, settings=dataclasses.replace(options.settings, read=read))


def summarize(report: dict) -> Table:
    """The waterfall as a table."""
    table = make_table("", "documents", "MB", "share of the text", numbers_from=1)

    def add(label: str, counts: dict) -> None:
        share = counts["bytes"] / max(report["read"]["bytes"], 1)
        table.add_row(label, f"{counts['documents']:,}", f"{counts['bytes'] / 1e6:,.2f}", f"{share:.2%}")

    add("read", report["read"])
    for line in report["waterfall"]:
        add(f"- {line['label']}", line)
    add("written", report["written"])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--list"]:
        print(list_configs(curation_configs()))
        return 0
    choose_cpu_without_tpu()
    console = make_console(stderr=True)
    try:
        with ends_at_signals("what is finished is kept; run the same command to resume."):
            options = parse_arguments(argv)
            report = run(options, console)
    except ModuleNotFoundError as error:
        console.print(f"error: {error.name} is missing: pip install 'bc2_jax[data]'")
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        console.print(f"error: {error}")
        return 1
    console.print(summarize(report))
    lost = sum(report["problems"]["reasons"].values())
    if lost:
        lines = f"{lost} places in the raw files gave no document; {options.out}/report.md names them."
        console.print(lines)
    if skipped := report["changes"].get("files that were skipped"):
        lines = f"{skipped} files of the folders were not read, for what they are; report.md names them."
        console.print(lines)
    for reason in report["problems"]["reasons"]:
        if "--encoding" in reason:
            console.print(reason)
    if not report["written"]["documents"]:
        console.print("No document is left: the table above says which step took how many.")
    console.print(f"{options.out}/report.md")
    return 0


def run(options: Arguments, console: Console) -> dict:
    """The report."""
    from bc2_jax.curate.engine import Engine
    from bc2_jax.curate.pipeline import curate

    require(bool(options.out), "--out", options.out, "it must name a folder")
    engine = Engine(options.runner)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total or None)
            progress.update(bars[stage], completed=done, total=total or None)

        return curate(options.raw, options.out, options.settings, engine, show)
