"""Trains a Baichuan 2: `bc2 train [CONFIG] [--field value ...]`; without arguments the demo.

CONFIG is a Python file, or the name of a config that comes with the program: `bc2 train --list` lists these.
`bc2 train CONFIG --help` documents every field. Exit codes: 0 at the end, 1 after an error; 75 when stopped by SIGTERM
and 130 by Ctrl-C, with the last step saved; 70 when the run hangs, 76 when another process is gone. After the latter,
and after a process was killed, start all processes again with `--resume auto`.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Sequence

import tyro

from bc2_jax.cli.configs import list_configs, run_configs
from bc2_jax.config.file import read_config_file
from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import command, use_utf8
from bc2_jax.train.kinds import KINDS, kind_of

STARTED = time.monotonic()


def without_where_and_how_long(args: list[str]) -> list[str]:
    """The arguments that say what is trained: the hints at the end add their own workdir and number of steps."""
    kept, skip = [], False
    for arg in args:
        name = arg.split("=")[0].replace("_", "-")
        flag = name in ("--workdir", "--resume", "--num-steps", "--num-epochs") or name.startswith("--distributed.")
        if not (skip or flag):
            kept.append(arg)
        skip = flag and "=" not in arg
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    typed = list(sys.argv[1:] if argv is None else argv)
    args = list(typed)
    if args == ["--list"]:
        print(list_configs(run_configs()))
        return 0
    path = args.pop(0) if args and not args[0].startswith("-") else run_configs()["demo"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bc2_jax").setLevel(logging.INFO)
    try:
        file = read_config_file(path, *KINDS)
        config = tyro.cli(type(file.config), default=file.config, args=args, description=file.doc)
        config = file.prepare(config)
        # After the command line is known to be right: --help answers at once.
        choose_cpu_without_tpu()
        import jax

        from bc2_jax.checkpoint import InterruptedSave
        from bc2_jax.train import distributed, loop

        kind = kind_of(config)
        config = kind.complete(config)
    except (ValueError, OSError, ArithmeticError) as error:
        sys.exit(f"error: {error}")
    try:
        again = command("train.py", *without_where_and_how_long(typed))
        result = loop.run(config, kind.make_job, again, STARTED)
        if jax.process_index() == 0:
            file.finish(config, result.workdir)
    except distributed.Preempted as stop:
        print(stop, flush=True)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("interrupted: what was saved stays; resume with --resume auto.", file=sys.stderr)
        distributed.leave(distributed.EXIT_INTERRUPTED)
    except TimeoutError as error:  # not all processes came
        print(f"error: {error}", file=sys.stderr)
        sys.exit(distributed.EXIT_LOST)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr)
        distributed.leave(distributed.EXIT_LOST if isinstance(error, InterruptedSave) else distributed.EXIT_ERROR)
    except Exception:  # of any kind, also that another process is gone: the exit code must say so
        traceback.print_exc()
        several = jax.distributed.is_initialized()
        distributed.leave(distributed.EXIT_LOST if several else distributed.EXIT_ERROR)
    return 0
