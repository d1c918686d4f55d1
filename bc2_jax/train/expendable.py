"""What a run can do without: it warns of what failed there, counts it, and goes on."""

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
    """Counts the failures of a run's expendable work: evaluations, metrics, samples, pictures, profiles."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Goes on after the block if an exception ends it; `what` is the kind of work, in the plural.

        With several processes, what JAX raises is not caught: another process may be gone, and none can go on alone.
        """
        try:
            yield
        except (jax.errors.JaxRuntimeError, TimeoutError) as error:
            if jax.process_count() > 1:
                raise
            self._note(what, error)
        except Exception as error:  # whatever it is, the run is worth more
            self._note(what, error)

    def _note(self, what: str, error: Exception) -> None:
        self.failures[what] += 1
        count = self.failures[what]
        if count & (count - 1) == 0:  # at 1, 2, 4, 8, ...: a full disk would be a line a step
            text = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s failed (%s); the run goes on. Failures of this kind: %d.", what, text[:500], count)

    def metrics(self) -> dict[str, float]:
        """failed_KIND of each kind of which something failed since the start of the process."""
        return {f"failed_{what}": float(count) for what, count in self.failures.items()}

    def summary(self) -> str:
        """All failures as a sentence, empty if there are none."""
        counts = ", ".join(f"{what} {count}" for what, count in self.failures.items())
        return f"Failures that did not end the run (see the log): {counts}." if counts else ""


class Profiler:
    """A trace of `count` steps from step `first` on, 0 for never, in `folder`; a run that resumes among them traces
    the rest."""

    def __init__(self, first: int, count: int, folder: Path, expendable: Expendable) -> None:
        self._steps, self._folder, self._expendable = range(first, first + count if first else 0), folder, expendable
        self._running, self._is_first = False, True

    def before(self, step: int) -> None:
        """The step is about to be dispatched."""
        if self._is_first and self._steps and step >= self._steps.stop:
            _log.warning(
                "Nothing is profiled: the steps from %d to %d lie before step %d.",
                self._steps.start,
                self._steps.stop - 1,
                step,
            )
        self._is_first = False
        if step in self._steps and not self._running:
            self._running = True
            with self._expendable.attempt("profiles"):
                jax.profiler.start_trace(str(self._folder))

    def after(self, step: int, metrics: Any) -> None:
        """The step was dispatched and will give `metrics`."""
        if self._running and step + 1 not in self._steps:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            self._running = False
            with self._expendable.attempt("profiles"):
                jax.profiler.stop_trace()
