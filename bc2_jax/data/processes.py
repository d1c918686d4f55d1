"""A pool of processes that end with their parent, and programs that end at once at SIGINT and SIGTERM."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

# Seconds for the main thread to end.
_PATIENCE = 5
Task = TypeVar("Task")
Result = TypeVar("Result")


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessPool:
    """Runs tasks on `processes` processes; with one, in this process."""

    def __init__(self, processes: int) -> None:
        # Spawned: the caller may have threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._executor = (
            concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
            if processes > 1
            else None
        )

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], done: Callable[[Task], object] = lambda _: None
    ) -> list[Result]:
        """The results of `function` in the order of tasks; calls done(task) in this process after each.

        Raises what a task raises, and RuntimeError if a process dies.
        """
        if self._executor is None:
            results = []
            for task in tasks:
                results.append(function(task))
                done(task)
            return results
        try:
            # Ctrl-C reaches every process of a terminal; blocked here, it is left to the parent.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                futures = {self._executor.submit(function, task): task for task in tasks}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in concurrent.futures.as_completed(futures):
                future.result()
                done(futures[future])
            return [future.result() for future in futures]
        except concurrent.futures.BrokenExecutor as error:
            raise RuntimeError(
                "A process died, perhaps for lack of memory; what is finished is kept: start again with fewer "
                "processes."
            ) from error


def _end_with_parent() -> None:
    """Otherwise a process of a pool waits for ever after its parent was killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def ends_at_signals(advice: str) -> Iterator[None]:
    """SIGINT (Ctrl-C) and SIGTERM end the process at once with one sentence, `advice`, and exit code 130 or 143.

    For the main thread of programs that write files whole or not at all. Engines install handlers of their own,
    continue with half of their results and may crash the interpreter at its end, so nothing runs after the signal.
    Processes of a pool are killed first; they share semaphores with the main thread, which gets some seconds to end.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    # Also if a shell has started the program with SIGINT ignored, which engines do not respect.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    received: list[int] = []

    def wait() -> None:
        while data := os.read(read, 1):
            if data[0] in numbers:
                received.append(data[0])
                word = "interrupted" if data[0] == signal.SIGINT else "terminated"
                cursor = "\033[?25h" if sys.stderr.isatty() else ""
                os.write(2, f"{cursor}\n{word}: {advice}\n".encode())
                children = multiprocessing.active_children()
                for child in children:
                    child.kill()
                time.sleep(_PATIENCE if children else 0)
                os._exit(128 + data[0])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            raise SystemExit(128 + received[0])
        os.close(write)
        thread.join()
        os.close(read)
