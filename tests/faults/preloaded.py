"""Processes that begin with their imports done: they are forked from one that has imported what train.py imports.

An import of JAX, Flax, Orbax and Grain takes 3 s of a core, and the tests of this folder start 70 processes. The
process they are forked from does nothing but import: no JAX backend is started in it and no thread. All that a run does
happens after the fork, in the same order as in a process started by itself.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODULES = [
    __name__, "pytest", "train", "bc2_jax.checkpoint", "bc2_jax.train.loop", "bc2_jax.train.pretrain",
    "bc2_jax.train.results",
    "bc2_jax.align.rl", "bc2_jax.align.rl_results", "bc2_jax.convert.hf", "matplotlib.pyplot", "tensorboardX",
    "jax._src.compilation_cache",
]  # fmt: skip

_context = multiprocessing.get_context("forkserver")


class Program:
    """A running Python program, with those members of subprocess.Popen that a `Job` uses."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        """`command`: a path and arguments; stdout and stderr go to `log`."""
        with _import_path():
            forkserver.set_forkserver_preload(MODULES)
            forkserver.ensure_running()
        self._process = _context.Process(target=_run, args=(command, environment, str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | Any:  # None before the end; typed as subprocess.Popen's
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def _import_path() -> Iterator[None]:
    """The environment in which the process that all are forked from starts: it finds the project."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(command: list[str], environment: dict[str, str], log: str) -> None:
    """As a process of its own: `python command...`, with the same ends as the interpreter's."""
    gc.freeze()  # what was imported stays, and its pages are shared as long as nobody looks for garbage there
    gc.set_threshold(20_000, 10, 20)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    code = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # private: only it also waits for the threads of pools
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
