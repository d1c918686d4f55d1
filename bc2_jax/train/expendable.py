"""Work that may fail without ending the run: metrics, evaluations, samples, pictures, profiles."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_log = logging.getLogger(__name__)


class Expendable:
    """Catches, logs and counts failures of a run's expendable work."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Logs an exception of the block and continues after it; `what` is the kind of work, in the plural.

        With several processes, JAX's own exceptions are raised: another process may be gone.
        """
        try:
            yield
        except (jax.errors.JaxRuntimeError, TimeoutError) as error:
            if jax.process_count() > 1:
                raise
            self._note(what, error)
        except Exception as error:  # no failure of this work may end the run
            self._note(what, error)

    def _note(self, what: str, error: Exception) -> None:
        self.failures[what] += 1
        count = self.failures[what]
        if count & (count - 1) == 0:  # at 1, 2, 4, 8, ...: a full disk would log a line per step
            text = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s failed (%s); the run continues. Failures of this kind: %d.", what, text[:500], count)

    def metrics(self) -> dict[str, float]:
        """failed_KIND of each kind of work that has failed since the process started."""
        return {f"failed_{what}": float(count) for what, count in self.failures.items()}

    def summary(self) -> str:
        """All failures as a sentence; empty without failures."""
        counts = ", ".join(f"{what} {count}" for what, count in self.failures.items())
        return f"Failures that did not end the run (see the log): {counts}." if counts else ""


class Profiler:
    """Writes a JAX trace of `count` steps from step `first` on (0: never) to `folder`.

    A run that resumes in between traces the remaining steps.
    """

    def __init__(self, first: int, count: int, folder: Path, expendable: Expendable) -> None:
        self._steps, self._folder, self._expendable = range(first, first + count if first else 0), folder, expendable
        self._running, self._is_first = False, True

    def before(self, step: int) -> None:
        """Call before a step is dispatched."""
        if self._is_first and self._steps and step >= self._steps.stop:
            last = self._steps.stop - 1
            _log.warning("Nothing is profiled: steps %d to %d are before step %d.", self._steps.start, last, step)
        self._is_first = False
        if step in self._steps and not self._running:
            self._running = True
            with self._expendable.attempt("profiles"):
                jax.profiler.start_trace(str(self._folder))

    def after(self, step: int, metrics: Any) -> None:
        """Call after a step was dispatched, with its (pending) metrics."""
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self._running:
            self._running = False
            with self._expendable.attempt("profiles"):
                jax.profiler.stop_trace()
