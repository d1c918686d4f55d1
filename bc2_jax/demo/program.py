"""A program that runs stages and reports on them: `bc2 demo --all` and `bc2 paper`."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bc2_jax.demo.progress import StageProgress, format_seconds
from bc2_jax.demo.report import About, make_report, write_docs, write_report
from bc2_jax.demo.runner import StageFailed, Stopped, run_stages
from bc2_jax.demo.stage import Stage, stages_for
from bc2_jax.terminal import make_console

NEEDED = {"daft": "data", "pyarrow": "data", "starlette": "serve", "uvicorn": "serve", "gguf": "gguf"}
"""Module -> extra that it is in."""


def check_extras(needed: Mapping[str, str]) -> None:
    """Raises ValueError, with what to type, if a package that a stage needs is missing."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(needed[name] for name in missing))
        names = ", ".join(missing)
        raise ValueError(f"not installed: {names}; pip install 'bc2_jax[{extras}]', or choose other stages.")


def run_and_report(stages: Sequence[Stage], workdir: Path, docs: Path | None, about: About, again: str) -> None:
    """Runs the stages and writes their report, also as the Markdown page `docs`; raises as `run_stages`."""
    console = make_console()
    progress = StageProgress(stages, console)
    with progress.shown():
        records = run_stages(stages, workdir, again, progress)
    report = make_report(about, stages, records, workdir)
    page = write_report(report, workdir)
    if docs is not None:
        write_docs(report, workdir, docs)
    totals = report["totals"]
    console.print(
        f"{format_seconds(totals['seconds'])}, {format_seconds(totals['cpu_seconds'])} of CPU time.\nreport  {page}"
    )


def run_program(
    args: argparse.Namespace, stages: Sequence[Stage], needed: Mapping[str, str], about: About, again: Sequence[str]
) -> int:
    """The exit code of a program with the options `workdir`, `docs` and `stages` (names, or None for all).

    `again` are the words of the command that continues after an interruption.
    """
    command = shlex.join(again)
    try:
        check_extras(needed)
        chosen = stages_for(stages, list(filter(None, (args.stages or "").split(","))))
        run_and_report(chosen, args.workdir, args.docs, about, command)
    except (ValueError, OSError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        name = signal.Signals(stop.number).name
        print(f"stopped by {name}: finished stages are kept; continue with: {command}", file=sys.stderr)
        return 128 + stop.number
    return 0
