"""Runs the checks within a time, keeps what was found so far in a file, and shows it as a table."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bc2_jax.agreement import first_decides
from bc2_jax.files import replaced
from bc2_jax.hardware.device import Device
from bc2_jax.hardware.golden import check_models
from bc2_jax.hardware.kernels import check_kernels
from bc2_jax.hardware.rates import (
    measure_attention,
    measure_collectives,
    measure_host,
    measure_matmuls,
    measure_memory,
)
from bc2_jax.hardware.results import Line, Outcome
from bc2_jax.hardware.steps import measure_decoding, measure_training
from bc2_jax.terminal import make_table
from bc2_jax.version import __version__

_KERNELS_SHARE = 0.4  # of the time, after which remaining cases are skipped


class Clock:
    """The time that is left; process 0's, so that all processes decide alike."""

    def __init__(self, seconds: float):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return first_decides(lambda: self._end - time.monotonic())


class Check(NamedTuple):
    name: str
    """As in the report and `--only`."""
    title: str
    run: Callable[[Device, Clock], Outcome]
    least: float
    """Seconds that must be left for it to start on an accelerator, compilation included; a CPU needs two."""


CHECKS = (
    Check("kernels", "kernels against the reference", lambda d, clock: check_kernels(
        d, lambda: clock.left() > (1 - _KERNELS_SHARE) * clock.seconds
    ), 20),
    Check("models", "tiny models with known logits", lambda d, _: check_models(d), 20),
    Check("matmuls", "matmuls", lambda d, _: measure_matmuls(d), 10),
    Check("memory", "device memory", lambda d, _: measure_memory(d), 10),
    Check("host", "host memory", lambda d, _: measure_host(d), 10),
    Check("attention", "attention kernels", lambda d, _: measure_attention(d), 20),
    Check("collectives", "collectives", lambda d, _: measure_collectives(d), 30),
    Check("training", "training step", lambda d, _: measure_training(d), 90),
    Check("decoding", "decoding step", lambda d, _: measure_decoding(d), 60),
)  # fmt: skip
MUST_PASS = ("kernels", "models")
"""Checks of which a failure means wrong results."""


@dataclasses.dataclass
class Report:
    """What was found so far."""

    device: Device
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def lines(self) -> list[Line]:
        return [line for outcome in self.outcomes.values() for line in outcome.lines]

    @property
    def sentences(self) -> list[str]:
        """What of the estimate is wrong."""
        return [line.sentence for line in self.lines if line.sentence]

    @property
    def is_wrong(self) -> bool:
        """Whether a check found wrong results, or one that looks for them raised an exception."""
        return any(o.status == "wrong" or (o.status == "failed" and n in MUST_PASS) for n, o in self.outcomes.items())

    def as_json(self) -> dict[str, Any]:
        """`device` and `rates` are what `tpu.rates.read_rates` takes; `rates` is empty unless the chip is known."""
        device = dataclasses.asdict(self.device) | {"chip": self.device.chip and self.device.chip.name}
        rates: dict[str, float] = {}
        for outcome in self.outcomes.values() if self.device.chip else ():
            rates |= outcome.rates
        checks = {n: o.as_json() | {"seconds": self.seconds.get(n, 0.0)} for n, o in self.outcomes.items()}
        return {
            "device": self.device.name, "hardware": device, "versions": versions(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rates": rates, "wrong": self.is_wrong,
            "sentences": self.sentences, "checks": checks,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Replaces the file at once, so that it is whole at any time."""
        with replaced(path) as partial:
            partial.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    found = {"bc2_jax": __version__}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_checks(
    device: Device, seconds: float, only: Iterable[str], tell: Callable[[str], None], keep: Callable[[Report], None]
) -> Report:
    """Runs the checks named in `only`, or all, until the time ends; `keep` is called after each.

    A check that has begun is not interrupted, so the last one may end later.
    """
    report, clock, chosen = Report(device), Clock(seconds), set(only)
    for check in CHECKS:
        if chosen and check.name not in chosen:
            continue
        begin, needed = time.monotonic(), 2.0 if device.is_small else check.least
        if clock.left() < needed:
            outcome = Outcome("skipped", f"less than {needed:.0f} s were left of {seconds:.0f} s")
        else:
            try:
                outcome = check.run(device, clock)
            except Exception as error:  # what one check cannot do on this hardware must not hide what others find
                words = str(error).splitlines()
                outcome = Outcome("failed", f"{type(error).__name__}: {words[0][:300] if words else ''}")
        taken = time.monotonic() - begin
        report.outcomes[check.name], report.seconds[check.name] = outcome, taken
        tell(f"{check.title}: {', '.join(filter(None, (outcome.status, outcome.text)))} ({taken:.0f} s)")
        keep(report)
    return report


def print_report(report: Report, out: Console) -> None:
    """The table of figures, and a sentence for each thing in which the estimate is wrong."""
    device = report.device
    table = make_table(
        "", "measured", "estimated", "measured / estimated", numbers_from=1,
        title=f"{device.count} x {device.kind}, of each device"
    )  # fmt: skip
    for line in report.lines:
        estimated = "-" if line.estimated is None else show(line.estimated, line.unit)
        ratio = "-" if line.ratio is None else f"{line.ratio:.2f}"
        table.add_row(line.name, show(line.measured, line.unit), estimated, ratio)
    if report.lines:
        out.print(table)
    for sentence in report.sentences:
        out.print(sentence)
    if not any(line.ratio for line in report.lines):
        out.print("Nothing is estimated for this device: the estimate knows TPUs.")
    elif not report.sentences:
        out.print("The estimate is within 10 % of everything that was measured.")


def show(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:,.1f} {unit}" if value >= 1 else f"{value:.3g} {unit}"
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.3f} ms"
