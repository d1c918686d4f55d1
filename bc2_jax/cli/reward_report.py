"""How often a reward model prefers the answer that people chose: by class of the prompt and by gap of the scores.

    bc2 reward-report RM PAIRS...            # RM: a run or checkpoint of a reward model
    bc2 reward-report RM ROWS --limit 2000   # ROWS of bc2 prepare-chat --pairs: its held-out pairs
    bc2 reward-report --plan 10000           # how many prompts of each class to collect, as CSV

PAIRS are files of preference pairs, as bc2 prepare-chat --pairs takes them, and folders of them. A record may say
the class of its prompt (--class-field; an id or a name of bc2_jax/align/taxonomy.json, or of --taxonomy FILE) and the
gap between the scores of its answers (--gap-field, or the difference of the fields --score-fields).

Prints accuracies with 95 % intervals beside the paper's, and the accuracy of preferring the longer answer; draws
reward_report.png (--picture FILE), and writes all of it as JSON with --json FILE, classes of the third level included.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import local_path, make_console, run_program


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="RM", type=local_path)
    parser.add_argument("pairs", nargs="*", metavar="PAIRS", type=local_path)
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="the first N pairs alone")
    parser.add_argument("--class-field", metavar="FIELD", help="default: class, or else category")
    parser.add_argument("--gap-field", metavar="FIELD", help="default: gap")
    parser.add_argument(
        "--score-fields", nargs=2, metavar=("CHOSEN", "REJECTED"), default=("score_chosen", "score_rejected"),
        help="whose difference is the gap of a record without one (default: score_chosen score_rejected)",
    )  # fmt: skip
    parser.add_argument("--taxonomy", type=local_path, metavar="FILE", help="another one than ours, in the same form")
    parser.add_argument("--level", type=int, choices=(1, 2, 3), default=2, help="classes shown (default 2)")
    parser.add_argument("--rows", type=int, default=8, help="conversations scored together (default 8)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--tensor", type=int, metavar="N", help="use all devices, cutting heads and vocabulary in N")
    parser.add_argument("--picture", type=local_path, metavar="FILE", default=Path("reward_report.png"))
    parser.add_argument("--json", type=local_path, metavar="FILE")
    parser.add_argument("--plan", type=int, metavar="N", help="print a plan for N prompts, and nothing else")
    return parser


def print_plan(taxonomy, count: int) -> None:
    from bc2_jax.align.taxonomy import LEVELS, plan_samples

    plan = plan_samples(taxonomy, count)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(("class", "zh", "en", "quota", "prompts"))
    for c in taxonomy.at(LEVELS):
        out.writerow(("/".join(c.path), c.zh, c.en, f"{c.quota:.6f}", plan[c.id]))


def run(args: argparse.Namespace) -> None:
    from bc2_jax.align.taxonomy import load_taxonomy

    taxonomy = load_taxonomy(args.taxonomy)
    if args.plan is not None:
        print_plan(taxonomy, args.plan)
        return
    if args.model is None or not args.pairs:
        raise ValueError("RM and PAIRS are needed: a reward model, and the pairs to measure it with.")
    choose_cpu_without_tpu()
    # Imported here so that --help and a typo answer at once.
    from bc2_jax.align.reward_report import (
        CLASS_FIELDS,
        GAP_FIELDS,
        judge,
        plot_report,
        print_report,
        read_pairs,
        summarize,
    )
    from bc2_jax.align.scoring import Scorer
    from bc2_jax.config import MeshConfig
    from bc2_jax.convert.reward import find_reward_model
    from bc2_jax.sharding import make_mesh

    out, errors = make_console(), make_console(stderr=True)
    find_reward_model(args.model)
    found, invalid = read_pairs(args.pairs, args.limit)
    for problem in itertools.islice(invalid, 5):
        errors.print(f"left out: {problem}")
    if len(invalid) > 5:
        errors.print(f"left out: {len(invalid):,} records in all")
    if not found:
        raise ValueError(f"PAIRS has no preference pair: {', '.join(map(str, args.pairs))}.")
    mesh = None if args.tensor is None else make_mesh(MeshConfig(tensor=args.tensor))
    scorer = Scorer.load(args.model, dtype=args.dtype, mesh=mesh, rows=args.rows)
    class_fields = CLASS_FIELDS if args.class_field is None else (args.class_field,)
    gap_fields = GAP_FIELDS if args.gap_field is None else (args.gap_field,)
    pairs, cut, lost = judge(scorer, found, class_fields, gap_fields, args.score_fields)
    longest = scorer.config.model_max_length
    if cut:
        errors.print(f"cut: {cut:,} pairs, longer than the {longest:,} tokens that the model takes")
    if lost:
        errors.print(f"left out: {lost:,} pairs without an answer, or with the same two, in those {longest:,} tokens")
    if not pairs:
        raise ValueError("PAIRS: nothing is left to measure the reward model with.")
    report = summarize(pairs, taxonomy)
    print_report(report, taxonomy, out, args.level)
    if args.json is not None:
        about = {"model": str(args.model), "pairs": [str(path) for path in args.pairs]}
        counts = {"left_out": len(invalid) + lost, "cut": cut}
        args.json.write_text(json.dumps(about | counts | report.as_json(), indent=1, ensure_ascii=False), "utf-8")
        out.print(f"JSON      {args.json}")
    plot_report(report, taxonomy, args.picture)
    out.print(f"picture   {args.picture}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, make_parser(), argv)
