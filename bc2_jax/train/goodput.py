"""Accounts the wall time of a run over all its restarts: WORKDIR/goodput.jsonl.

A session is one process from start to end. At every checkpoint and at its end it appends a line with its seconds by
phase so far; the last line of a session counts. What a killed session did after its last line was lost and counts as
idle, like the time until the next session.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from bc2_jax.terminal import make_table

_log = logging.getLogger(__name__)
PHASES = {
    "start": "start",
    "restore": "restore",
    "compile": "compile",
    "step": "productive steps",
    "repeated": "repeated steps",
    "data_wait": "data wait, at most",
    "rollout": "rollouts and scores",
    "save": "blocked by saving",
    "evaluation": "evaluation",
    "other": "other",
    "idle": "idle or lost",
}


class Goodput:
    """The clock of one session; every moment belongs to one of PHASES."""

    def __init__(self, path: Path, started: float | None = None):
        """`started` is the time.monotonic() at which the program began, by default now."""
        self.path, self.start_step, self.steps_done = path, 0, 0
        now = time.monotonic()
        self._last = now if started is None else started
        self._begin = time.time() - (now - self._last)
        self._phase = "start"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.start_up: dict[str, float] = {}
        """Seconds of the start by `startup.StartUp` phase; empty until the first step has ended."""

    def enter(self, phase: str) -> str:
        """Counts the time from now on as `phase`; returns the previous phase."""
        now = time.monotonic()
        self.seconds[self._phase] += now - self._last
        before, self._phase, self._last = self._phase, phase, now
        return before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def metrics(self) -> dict[str, float]:
        """Seconds of this session by phase, and the share of productive steps."""
        self.enter(self._phase)
        total = sum(self.seconds.values())
        seconds = {f"seconds_{name}": value for name, value in self.seconds.items() if value}
        return {"goodput": self.seconds["step"] / total if total else 0.0, **seconds}

    def record(self, step: int) -> None:
        """Appends this session's line, up to `step`."""
        if jax.process_index() != 0:
            return
        self.enter(self._phase)
        line: dict[str, Any] = {"begin": self._begin, "end": time.time(), "start_step": self.start_step, "step": step}
        line |= {"steps_done": self.steps_done, "seconds": self.seconds, "start_up": self.start_up}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # no reason to stop; at a full disk the failing save explains it better
            _log.warning("%s could not be written (%s): the time up to step %d may be missing.", self.path, error, step)


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """The last line of each session, in order; unfinished lines of killed sessions are left out."""
    sessions: dict[float, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            line = json.loads(text)
            for name in ("begin", "end", "start_step", "step", "steps_done"):
                float(line[name])
            line["seconds"] = {name: float(value) for name, value in line["seconds"].items()}
            sessions[line["begin"]] = line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return list(sessions.values())


def summarize(sessions: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase of all sessions, from the start of the first to the end of the last.

    Steps that were done again, after a restart or a rewind, count as `repeated`, at the mean step time of their
    session. A clock set back between sessions gives no negative idle time.
    """
    total = dict.fromkeys(PHASES, 0.0)
    for index, session in enumerate(sessions):
        for name, value in session["seconds"].items():
            total[name] = total.get(name, 0.0) + value
        kept_until = min([session["step"], *(later["start_step"] for later in sessions[index + 1 :])])
        repeated = session["steps_done"] - max(kept_until - session["start_step"], 0)
        if session["steps_done"] and repeated > 0:
            moved = session["seconds"]["step"] * repeated / session["steps_done"]
            total["step"] -= moved
            total["repeated"] += moved
        if index:
            total["idle"] += max(session["begin"] - sessions[index - 1]["end"], 0.0)
    return total


def goodput_table(sessions: list[dict[str, Any]]) -> Table:
    """Seconds and shares, of the last session and of all."""
    columns = [summarize(sessions[-1:]), summarize(sessions)]
    headers = ("", "this session", "", f"all {len(sessions)} session(s)", "")
    table = make_table(*headers, title="Wall time in seconds", numbers_from=1)
    sums = [sum(column.values()) or 1.0 for column in columns]
    for name, text in PHASES.items():
        if columns[1][name]:
            cells = ((f"{c[name]:,.1f}", f"{c[name] / s:.2%}") for c, s in zip(columns, sums, strict=True))
            table.add_row(text, *(cell for pair in cells for cell in pair))
    return table
