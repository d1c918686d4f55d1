"""The checkpoints of a run: what they are, whether they are whole, and their export as released revisions.

bc2 checkpoints RUN                              # step, tokens, loss, validation loss, state
bc2 checkpoints RUN --verify                     # reads and compares every byte
bc2 checkpoints RUN --export 1000 [--to FOLDER]  # bf16 in the released layout, FOLDER/train_00220B
bc2 checkpoints RUN --export all                 # every permanent one
bc2 checkpoints RUN --seal 1000                  # takes one without a manifest as it is

Exits with 1 if a checkpoint is damaged. docs/checkpoints.md has the details.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import local_path, make_console, make_table, use_utf8


def parse_steps(text: str) -> list[int] | None:
    """The steps of "1000" or "1000,2000"; None for "all"."""
    if text == "all":
        return None
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not valid: a step, steps with commas between, or all")
    return [int(part) for part in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=local_path)
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--verify", action="store_true", help="read and compare every byte")
    actions.add_argument(
        "--export", type=parse_steps, metavar="STEP", default=argparse.SUPPRESS, help="STEP,... or all"
    )
    actions.add_argument("--seal", type=int, metavar="STEP", help="write the manifest of a checkpoint that has none")
    parser.add_argument("--to", type=local_path, metavar="FOLDER", help="folder of the exports; default: RUN/released")
    return parser


def show(run: Path, verify: bool) -> int:
    from bc2_jax.train.milestones import list_milestones

    out = make_console()
    table = make_table("step", "tokens", "loss", "validation loss", "kept", "state")
    for column in table.columns[:4]:
        column.justify = "right"
    milestones = list_milestones(run, hashes=verify)
    for m in milestones:
        losses = ("" if loss is None else f"{loss:.4f}" for loss in (m.loss, m.validation_loss))
        good = "every byte as written" if verify else "complete"
        table.add_row(
            f"{m.step:,}", f"{m.tokens:,}", *losses, "for ever" if m.permanent else "", "damaged" if m.problem else good
        )
    out.print(table)
    problems = [m.problem for m in milestones if m.problem]
    for problem in problems:
        out.print(problem)
    return 1 if problems else 0


def seal(run: Path, step: int) -> int:
    from bc2_jax import manifest
    from bc2_jax.files import lock
    from bc2_jax.metadata import is_complete
    from bc2_jax.train.start import LOCK_NAME

    folder = run / "checkpoints" / str(step)
    if not is_complete(folder):
        raise ValueError(f"--seal = {step} is not valid: {folder} is not a complete checkpoint.")
    if (folder / manifest.MANIFEST_NAME).exists():
        raise ValueError(
            f"--seal = {step} is not valid: {folder} has a {manifest.MANIFEST_NAME}; --verify compares it."
        )
    with lock(run / LOCK_NAME, f"{run}"):
        files = manifest.write_manifest(folder)
    make_console().print(
        f"{folder}: {len(files)} files, {sum(f.size for f in files.values()):,} bytes, taken as they are."
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    args = make_parser().parse_args(argv)
    choose_cpu_without_tpu()
    try:
        if args.seal is not None:
            return seal(args.run, args.seal)
        if not hasattr(args, "export"):
            return show(args.run, args.verify)
        from bc2_jax.train.milestones import export

        for done in export(args.run, args.export, args.to or args.run / "released"):
            make_console().print(f"Wrote {done.target}, parameters sha256 {done.fingerprint}.")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
