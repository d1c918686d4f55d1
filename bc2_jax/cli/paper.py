"""The Baichuan 2 report in miniature: its tables and figures, made with small models by the programs of this project.

bc2 paper                                # all parts, at most an hour on 2 cores
bc2 paper --parts norm_head,max_z        # these parts and what they build on
bc2 paper --list                         # names and titles

Stopped or killed, the same command resumes with the unfinished part. WORKDIR/report.html shows each part with its
commands, the report's own figures, and a sentence on what agrees and what cannot at this size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import use_utf8

WORKDIR = Path("runs/paper")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bc2 paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--parts", dest="stages", metavar="A,B,...", help="these parts and those that they build on")
    add("--list", action="store_true", help="print the names of all parts and end")
    add("--workdir", type=Path, metavar="DIR", default=WORKDIR, help="where everything is written (%(default)s)")
    add("--docs", type=Path, metavar="FILE.md", help="also write the report as a Markdown page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    typed = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(typed)
    choose_cpu_without_tpu()
    from bc2_jax.demo.paper import make_parts
    from bc2_jax.demo.program import NEEDED, run_program
    from bc2_jax.demo.report import About

    parts = make_parts()
    if args.list:
        width = max(len(part.name) for part in parts)
        print("\n".join(f"{part.name:{width}}  {part.title}" for part in parts))
        return 0
    needed = {name: extra for name, extra in NEEDED.items() if extra == "data"} | {"libtpu": "tpu"}
    if args.stages and "mfu" not in args.stages.split(","):
        del needed["libtpu"]
    about = About(
        "The paper in miniature",
        "Tables and figures of the Baichuan 2 report (arXiv 2309.10305), made by the programs of this project with "
        "models that train in a minute, beside the report's own figures. A part that contradicts the report says so.",
        "bc2 paper",
    )
    return run_program(args, parts, needed, about, ["bc2", "paper", *typed])


if __name__ == "__main__":
    sys.exit(main())
