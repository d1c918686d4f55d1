"""How far the stages are: a bar with the time left on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bc2_jax.demo.records import Record
from bc2_jax.demo.stage import Stage

_TAIL = 2000
_WIDTH = 100
_MOST_OF_A_STAGE = 0.95
"""A running stage counts as done up to here, however late it is."""


def format_seconds(seconds: float) -> str:
    """45 s, 3:20 min, 1:02 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def last_line(log: Path) -> str:
    """The last line of a log that has text, shortened."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:_WIDTH] for line in reversed(lines) if line.strip()), "")


class StageProgress:
    """The `Show` of `run_stages`."""

    def __init__(self, stages: Sequence[Stage], console: Console) -> None:
        self._stages, self._console = stages, console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._index, self._started = 0, 0.0
        self._expected_so_far = self._took_so_far = 0.0
        """Of the stages that ran now."""

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar while the block runs, if this is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=self._console) as self._bar:
            total = sum(stage.seconds for stage in self._stages)
            self._task = self._bar.add_task("", total=total, left="")
            yield
        self._bar = None

    def begin(self, stage: Stage, index: int) -> None:
        self._index, self._started = index, time.monotonic()
        if self._bar is None:
            self._console.print(f"[{index + 1}/{len(self._stages)}] {stage.title}")

    def working(self, log: Path) -> None:
        if self._bar is None:
            return
        stage = self._stages[self._index]
        left = self.seconds_left()
        before = sum(one.seconds for one in self._stages[: self._index])
        share = min((time.monotonic() - self._started) / self.slowness() / stage.seconds, _MOST_OF_A_STAGE)
        self._bar.update(
            self._task, completed=before + share * stage.seconds, left=f"about {format_seconds(left)} left",
            description=f"[{self._index + 1}/{len(self._stages)}] {stage.title}\n{last_line(log)}\n",
        )  # fmt: skip

    def slowness(self) -> float:
        """Real over expected time of the stages that ran now; 1 before any has."""
        return self._took_so_far / self._expected_so_far if self._expected_so_far else 1.0

    def seconds_left(self) -> float:
        """Expected for the rest of this stage and the stages behind it, at the speed of those before."""
        here = self._stages[self._index].seconds * self.slowness()
        behind = sum(stage.seconds for stage in self._stages[self._index + 1 :]) * self.slowness()
        return max(here - (time.monotonic() - self._started), (1 - _MOST_OF_A_STAGE) * here) + behind

    def end(self, stage: Stage, record: Record, was_done: bool) -> None:
        if was_done:
            text = f"already done, in {format_seconds(record.seconds)}"
        else:
            self._expected_so_far += stage.seconds
            self._took_so_far += record.seconds
            text = f"{format_seconds(record.seconds)}, {format_seconds(record.cpu_seconds)} of CPU time"
        self._console.print(f"[{self._index + 1}/{len(self._stages)}] {stage.title}: {text}")
