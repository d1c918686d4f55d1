"""Tasks on several processes that end with their parent."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class ProcessPool:
    """Runs tasks on `processes` processes; with one, here."""

    def __init__(self, processes: int) -> None:
        # Spawned: the process that calls us may have threads, which a fork does not survive.
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
        """The results of `function` in the order of the tasks; calls done(task) here when a task is finished.

        Raises what a task raises, and RuntimeError if a process dies.
        """
        if self._executor is None:
            results = []
            for task in tasks:
                results.append(function(task))
                done(task)
            return results
        try:
            futures = {self._executor.submit(function, task): task for task in tasks}
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
    """A process of a pool would wait for ever after its parent was killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
