"""Fits a scaling law to the runs of a ladder, and predicts larger models with an interval.

bc2 scaling-law runs/tiny_ladder/h*
bc2 scaling-law RUNS... --predict 7b,13b --tokens 2.6e12 --out DIR
bc2 scaling-law --points points.csv --fit-on '^small' --compare '^large'
bc2 scaling-law --plan 20000 --chip v5p          # chip-hours: which rungs, what each costs, what they say

Takes the last loss on held-out text of each run (docs/scaling.md says what else is checked), in nats a token. Prints
predictions first, then the largest run predicted from the others, then parameters; writes scaling.json and scaling.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bc2_jax.terminal import local_path, make_console, make_table, use_utf8

if TYPE_CHECKING:
    from bc2_jax.evaluate.scaling.collection import Points

out = make_console()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    parser.add_argument("--points", type=local_path, help="a CSV file with N and D or C, and loss, in place of runs")
    parser.add_argument("--fit-on", default="", help="with --points: only rows whose name this pattern finds")
    parser.add_argument("--compare", help="with --points: rows to predict, and to compare with their loss")
    parser.add_argument("--predict", default="", help="7b, 13b or config files, separated by commas; 13b with --plan")
    parser.add_argument("--tokens", type=float, default=2.6e12, help="tokens of what is predicted; 2.6e12 by default")
    parser.add_argument(
        "--law", default="auto", choices=("auto", "compute", "surface"),
        help="L = a C^b + L_inf, or L = E + A / N^alpha + B / D^beta; auto takes the second where N and D both differ",
    )  # fmt: skip
    parser.add_argument(
        "--delta", type=float, default=1e-3, help="of Huber's loss of log residuals; 1 for least squares"
    )
    parser.add_argument(
        "--out", type=local_path, help="folder for scaling.json and scaling.png; by default scaling_law"
    )
    parser.add_argument("--plan", type=float, metavar="CHIP_HOURS", help="plan the paper's ladder for this budget")
    parser.add_argument("--chip", help="with --plan: generation of TPU, v5p by default")
    parser.add_argument("--ladder-tokens", type=float, help="with --plan: tokens of each rung, 1e12 by default")
    parser.add_argument("--noise", type=float, help="with --plan: scatter of a run's loss as a share; 0.001 by default")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that have no effect together, and for values that are not valid."""
    if args.plan is None and bool(args.runs) == bool(args.points):
        raise ValueError("give the folders of runs, or --points FILE.csv, or --plan CHIP_HOURS; not several of them.")
    if args.runs and args.points:  # what a plan simulates
        raise ValueError("runs and --points are both given: leave one out.")
    if (args.fit_on or args.compare) and not args.points:
        raise ValueError("--fit-on and --compare are for the rows of --points.")
    for name, value in (("chip", args.chip), ("ladder-tokens", args.ladder_tokens), ("noise", args.noise)):
        if args.plan is None and value is not None:
            raise ValueError(f"--{name} is an option of --plan.")
    for name, is_given in (("out", args.out), ("compare", args.compare), ("law", args.law != "auto")):
        if args.plan is not None and is_given:
            raise ValueError(
                f"--{name} has no effect with --plan, which simulates L = a C^b + L_inf and writes no file."
            )
    if args.noise is not None and not 0 < args.noise < 0.5:
        raise ValueError(f"--noise = {args.noise:g} is not valid: it must be between 0 and 0.5, for instance 0.001.")
    for name in ("tokens", "ladder_tokens", "plan"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} = {value:g} is not valid: it must be positive and finite.")


def fit_and_report(args: argparse.Namespace) -> None:
    from bc2_jax.evaluate.scaling.analysis import analyse, print_analysis, save_analysis
    from bc2_jax.evaluate.scaling.collection import collect, read_points
    from bc2_jax.evaluate.scaling.ladder import make_target

    targets = [make_target(name, args.tokens) for name in filter(None, args.predict.split(","))]
    points: Points
    if args.points:
        points, compared = read_points(args.points, args.fit_on, args.compare)
        targets += compared
    else:
        points = collect(args.runs)
    analysis = analyse(points, targets, args.law, args.delta)
    print_analysis(analysis, out)
    folder = args.out or Path("scaling_law")
    save_analysis(analysis, folder)
    out.print(f"written: {folder / 'scaling.json'}, {folder / 'scaling.png'}")


def plan(args: argparse.Namespace) -> None:
    from bc2_jax.evaluate.scaling import plan as planning
    from bc2_jax.evaluate.scaling.analysis import analyse
    from bc2_jax.evaluate.scaling.collection import collect, read_points
    from bc2_jax.evaluate.scaling.ladder import PAPER_TOKENS, make_target

    target = make_target(args.predict or "13b", args.tokens)
    tokens = PAPER_TOKENS if args.ladder_tokens is None else args.ladder_tokens
    chip, law = args.chip or "v5p", None
    if args.runs or args.points:
        points = collect(args.runs) if args.runs else read_points(args.points, args.fit_on)[0]
        law = analyse(points, law="compute", delta=args.delta).fit
    costs = planning.cost_rungs(chip, tokens, planning.compile_rung, lambda text: print(text, flush=True))
    table = make_table(
        "rung", "head size", "FLOPs", "head", "attention", "MFU", "chip-hours", "",
        title=f"The paper's ladder, {tokens:.4g} tokens each, on {chip}", numbers_from=1,
    )  # fmt: skip
    for cost in costs:
        c = cost.compute
        table.add_row(
            f"h{cost.hidden}", str(cost.head_size), f"{c.total:.4g}", f"{c.head / c.total:.0%}",
            f"{c.attention / c.total:.0%}", f"{cost.mfu:.3f}", f"{cost.chip_hours:,.0f}", cost.note,
        )  # fmt: skip
    out.print(table)
    if not all(cost.is_compiled for cost in costs):
        out.print(
            f"warning: libtpu is not installed, so nothing was compiled: MFU {planning.ASSUMED_MFU} is assumed for "
            "all, also for head sizes that waste lanes. pip install -e '.[tpu]' for estimates."
        )
    noise = planning.ASSUMED_NOISE if args.noise is None else args.noise
    choices = planning.choose(costs, target, law, noise)
    table = make_table(
        "ladder", "chip-hours", f"95 % of {target.name} on {target.D:.4g} tokens",
        title=f"How sure its prediction is, by simulation: runs scatter about the law by {noise:.3%}", numbers_from=1,
    )  # fmt: skip
    for choice in choices:
        table.add_row(
            f"h{choice.rungs[0]} to h{choice.rungs[-1]}", f"{choice.chip_hours:,.0f}", f"{choice.width:.2%} wide"
        )
    out.print(table)
    fitting = [choice for choice in choices if choice.chip_hours <= args.plan]
    if not fitting:
        out.print(
            f"{args.plan:,.0f} chip-hours are too few for {planning.FEWEST_RUNGS} rungs, which cost "
            f"{choices[0].chip_hours:,.0f}: fewer tokens each (--ladder-tokens) cost less."
        )
        return
    best = min(fitting, key=lambda choice: choice.width)
    rungs = ", ".join(f"paper_h{hidden}" for hidden in best.rungs)
    out.print(f"Of {args.plan:,.0f} chip-hours, {best.chip_hours:,.0f} for {len(best.rungs)} rungs: {rungs}")


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    args = make_parser().parse_args(argv)
    try:
        check_options(args)
        if args.plan is not None:
            plan(args)
        else:
            fit_and_report(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
