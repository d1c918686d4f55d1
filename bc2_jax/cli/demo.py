"""Shows what the program can do: `bc2 demo` trains a small model, `bc2 demo --all` is the whole life of one.

bc2 demo [--field value ...]     # bc2 train demo: pre-training on real text, about 5 minutes on 2 cores
bc2 demo --all                   # raw text to a served chat model, at most 15 minutes on 2 cores

--all runs the real programs with small settings: curation, tokenizer, pre-training, a scaling law, chat fine-tuning, a
reward model, DPO, PPO, evaluation, export, server. Stopped or killed, the same command resumes with the unfinished
stage. At the end WORKDIR/report.html shows the pictures, tables and commands of all stages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import use_utf8

WORKDIR = Path("runs/demo_all")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bc2 demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--all", action="store_true", help="all stages, not pre-training alone")
    add("--workdir", type=Path, metavar="DIR", default=WORKDIR, help="with --all: where all is written (%(default)s)")
    add("--stages", metavar="A,B,...", help="with --all: these stages and those that they need")
    add("--docs", type=Path, metavar="FILE.md", help="with --all: also write the report as a Markdown page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    typed = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if "--all" not in typed and not {"--help", "-h"} & set(typed):
        from bc2_jax.cli.train import main as train

        return train(["demo", *typed])
    args = parser.parse_args(typed)
    choose_cpu_without_tpu()
    from bc2_jax.demo.program import NEEDED, run_program
    from bc2_jax.demo.report import About
    from bc2_jax.demo.stages import make_stages

    about = About(
        "The whole life of a model in one command",
        "From raw text to a served chat model on a laptop: every stage is the real program with small settings. Models "
        "that learn for minutes are bad; what the figures show is that each part works and how it is measured.",
        "bc2 demo --all",
    )
    return run_program(args, make_stages(), NEEDED, about, ["bc2", "demo", *typed])


if __name__ == "__main__":
    sys.exit(main())
