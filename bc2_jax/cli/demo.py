"""Shows what the program can do: `bc2 demo` trains a small model, `bc2 demo --all` is the whole life of one.

bc2 demo [--field value ...]     # bc2 train demo: pre-training on real text, about 5 minutes on 2 cores
bc2 demo --all                   # raw text to a served chat model, at most 15 minutes on 2 cores

--all runs the real programs with small settings: curation, tokenizer, pre-training, a scaling law, chat fine-tuning, a
reward model, DPO, PPO, evaluation, export, server. Stopped or killed, the same command resumes with the unfinished
stage. At the end WORKDIR/report.html shows the pictures, tables and commands of all stages.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import make_console, use_utf8

WORKDIR = Path("runs/demo_all")
# Module -> extra that it is in.
_NEEDED = {"daft": "data", "pyarrow": "data", "starlette": "serve", "uvicorn": "serve", "gguf": "gguf"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bc2 demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--all", action="store_true", help="all stages, not pre-training alone")
    add("--workdir", type=Path, metavar="DIR", help=f"with --all: where everything is written (default {WORKDIR})")
    add("--stages", metavar="A,B,...", help="with --all: these stages and those that they need")
    add("--docs", type=Path, metavar="FILE.md", help="with --all: also write the report as a Markdown page")
    return parser


def check_extras() -> None:
    """Raises ValueError, with what to type, if a package that a stage needs is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(_NEEDED[name] for name in missing))
        raise ValueError(f"{', '.join(missing)} is missing: pip install 'bc2_jax[{extras}]'.")


def run_all(args: argparse.Namespace, again: str) -> None:
    from bc2_jax.demo.progress import StageProgress, format_seconds
    from bc2_jax.demo.report import About, make_report, write_docs, write_report
    from bc2_jax.demo.runner import run_stages
    from bc2_jax.demo.stage import stages_for
    from bc2_jax.demo.stages import make_stages

    check_extras()
    console = make_console()
    stages = stages_for(make_stages(), list(filter(None, (args.stages or "").split(","))))
    workdir = args.workdir or WORKDIR
    progress = StageProgress(stages, console)
    with progress.shown():
        records = run_stages(stages, workdir, again, progress)
    about = About(
        "The whole life of a model in one command",
        "From raw text to a served chat model on a laptop: every stage is the real program with small settings. Models "
        "that learn for minutes are bad; what the figures show is that each part works and how it is measured.",
        "bc2 demo --all",
    )
    report = make_report(about, stages, records, workdir)
    page = write_report(report, workdir)
    if args.docs is not None:
        write_docs(report, workdir, args.docs)
    totals = report["totals"]
    console.print(
        f"{format_seconds(totals['seconds'])}, {format_seconds(totals['cpu_seconds'])} of CPU time.\nreport  {page}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    typed = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if "--all" not in typed and not {"--help", "-h"} & set(typed):
        from bc2_jax.cli.train import main as train

        return train(["demo", *typed])
    args = parser.parse_args(typed)
    choose_cpu_without_tpu()
    again = shlex.join(["bc2", "demo", *typed])
    from bc2_jax.demo.runner import StageFailed, Stopped

    try:
        run_all(args, again)
    except (ValueError, OSError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        name = signal.Signals(stop.number).name
        print(f"stopped by {name}: finished stages are kept; continue with: {again}", file=sys.stderr)
        return 128 + stop.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
