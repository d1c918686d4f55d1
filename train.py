"""Trains a Baichuan 2: `python train.py [CONFIG.py] [--field value ...]`; without arguments the demo.

`python train.py CONFIG.py --help` documents every field.
"""

from __future__ import annotations

import logging
import runpy
import shlex
import sys
import time
from pathlib import Path

import tyro

from bc2_jax.config import TrainConfig

STARTED = time.monotonic()
DEMO = Path(__file__).parent / "configs" / "demo.py"


def without_where_and_how_long(args: list[str]) -> list[str]:
    """The arguments that say what is trained: the hints at the end add their own workdir and number of steps."""
    kept, skip = [], False
    for arg in args:
        flag = arg.split("=")[0].replace("_", "-") in ("--workdir", "--resume", "--num-steps")
        if not (skip or flag):
            kept.append(arg)
        skip = flag and "=" not in arg
    return kept


def main() -> None:
    args = sys.argv[1:]
    path = args.pop(0) if args and args[0].endswith(".py") else DEMO
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bc2_jax").setLevel(logging.INFO)
    try:
        file = runpy.run_path(str(path))
        config = tyro.cli(TrainConfig, default=file["config"](), args=args, description=file["__doc__"])
        if "prepare" in file:
            config = file["prepare"](config)
        from bc2_jax.train.loop import train  # after the command line is known to be right: --help answers at once

        train(config, command=shlex.join(["train.py", *without_where_and_how_long(sys.argv[1:])]), started=STARTED)
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
