"""What a check of the hardware finds: whether it passed, lines of figures, and rates for the estimate."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

WORTH_SAYING = 0.10
"""Relative difference from which an estimate is called wrong."""
Status = Literal["passed", "wrong", "measured", "failed", "skipped"]


@dataclasses.dataclass(frozen=True)
class Line:
    """One figure, of one chip unless its name says otherwise."""

    name: str
    unit: str
    """"s" for a time, where a ratio above 1 is slower than estimated; else a rate, where it is faster."""
    measured: float
    estimated: float | None = None  # None: nothing estimates it
    corrects: str = ""
    """What a wrong estimate is corrected by, in words; a field of `tpu.rates.Rates` where there is one."""

    @property
    def ratio(self) -> float | None:
        """Measured over estimated; None without an estimate, or if it is 0."""
        return self.measured / self.estimated if self.estimated else None

    @property
    def sentence(self) -> str:
        """What is wrong with the estimate, "" if it is within WORTH_SAYING."""
        ratio = self.ratio
        if ratio is None or abs(ratio - 1) <= WORTH_SAYING:
            return ""
        is_time = self.unit == "s"
        word = ("slower" if is_time else "higher") if ratio > 1 else ("faster" if is_time else "lower")
        percent = abs(ratio - 1) if not is_time or ratio > 1 else 1 - ratio
        return f"{self.name} is {percent:.0%} {word} than estimated{'; ' + self.corrects if self.corrects else ''}."

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio, "sentence": self.sentence}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a check."""

    status: Status
    text: str = ""
    lines: tuple[Line, ...] = ()
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Fields of `tpu.rates.Rates` that were measured."""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further JSON values."""

    def as_json(self) -> dict[str, Any]:
        lines = [line.as_json() for line in self.lines]
        return {"status": self.status, "text": self.text, "lines": lines, "rates": self.rates, **self.details}
