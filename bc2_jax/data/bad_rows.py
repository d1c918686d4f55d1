"""Rows that can't be read: with how many of them a run goes on."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from bc2_jax.data.row_file import BadRow

logger = logging.getLogger(__name__)


class BadRows:
    """Counts the rows of this process that can't be read and names them in the log, each once however often it is read.

    Several threads may use it: training rows are read ahead while validation rows are read.
    """

    def __init__(self, limit: int) -> None:
        """`limit` is data.max_bad_rows."""
        self._limit = limit
        self._seen: set[tuple[Path, int]] = set()
        self._lock = threading.Lock()

    def add(self, bad: BadRow) -> None:
        """Raises ValueError if the run must not go on without this row."""
        with self._lock:
            if (bad.path, bad.row) in self._seen:
                return
            if len(self._seen) >= self._limit:
                raise ValueError(
                    f"{bad.finding}: the file is damaged, was replaced or is out of reach, and data.max_bad_rows = "
                    f"{self._limit} allows no more."
                ) from bad
            self._seen.add((bad.path, bad.row))
            logger.warning(
                "%s: padding takes its place; bad row %d of at most data.max_bad_rows = %d.",
                bad.finding, len(self._seen), self._limit,
            )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """{"bad_rows": their number so far, those read ahead included}, or nothing if there are none."""
        return {"bad_rows": float(len(self._seen))} if self._seen else {}
