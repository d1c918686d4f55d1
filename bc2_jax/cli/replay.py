"""Repeats a recorded training step and compares it bit for bit with the record: bad hardware or bad data?

    bc2 replay CHECKPOINT_OR_RUN --step N [--batch bad_batch_step_N.npz ...]

Starts from the newest checkpoint before N and repeats every step up to N, on as many devices as the run had. --batch
takes the rows of step N from what the run saved when it stopped, one file for each of its processes in their order.
Prints "identical", or what differs. Exit code 0: identical; 1: different; 2: the step can't be repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import use_utf8


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="CHECKPOINT_OR_RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--step", type=int, required=True, help="step to compare")
    parser.add_argument("--batch", nargs="+", default=(), metavar="FILE", help="saved rows of the step, .npz")
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    options = parse_arguments(argv)
    choose_cpu_without_tpu()
    try:
        import jax

        from bc2_jax.train.replay import describe, replay, verdict

        def say(text: str) -> None:
            if jax.process_index() == 0:
                print(text, flush=True)

        comparisons = []
        for comparison in replay(options.path, options.step, options.batch):
            say(describe(comparison))
            comparisons.append(comparison)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(verdict(comparisons))
    return 1 if any(comparison.different for comparison in comparisons) else 0
