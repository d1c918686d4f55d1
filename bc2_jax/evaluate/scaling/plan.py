"""What a ladder costs before it is run, and how wide the interval of its prediction will be."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bc2_jax.evaluate.scaling.collection import Point
from bc2_jax.evaluate.scaling.fit import Fit, fit_compute
from bc2_jax.evaluate.scaling.flops import Compute, training_compute
from bc2_jax.evaluate.scaling.ladder import LENGTH, RUNGS, paper_rung
from bc2_jax.terminal import program_words
from bc2_jax.tpu.chips import CHIPS
from bc2_jax.validation import choices, require

ASSUMED_MFU = 0.4
"""Where nothing can be compiled."""
ASSUMED_LAW = (85.0, -0.082, 1.58)
"""a, b, L_inf of the simulated ladders where no runs are given: about what 10^23 FLOPs give (2.67 nats a token)."""
ASSUMED_NOISE = 0.001
"""Standard deviation of a run's loss about the law, as a share: two seeds differ by 0.02 to 0.03 %, runs of a ladder
from any law by several times that."""
FEWEST_RUNGS = 4
_DRAWS = 12
_BATCHES = (8, 4, 2, 1)
"""Sequences a chip, from the largest that is tried."""
# Chips that a rung is compiled for: of the smallest slices, as ladders are trained on.
_SLICES = {"v4": "2x2x1", "v5e": "2x4", "v5p": "2x2x1", "v6e": "2x4", "tpu7x": "2x2x1"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a rung."""

    hidden: int
    head_size: int
    compute: Compute
    mfu: float
    """Of a step; estimated at compile time, or assumed."""
    chip_hours: float
    is_compiled: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The smallest rungs up to one."""

    rungs: tuple[int, ...]
    chip_hours: float
    width: float
    """Median over simulated ladders of high / low - 1 of the 95 % interval of the target's loss."""


Estimate = Callable[[int, str], tuple[float, str] | None]
"""(hidden size, generation) -> (MFU, on what), or None where nothing can be compiled."""


def cost_rungs(
    chip: str, tokens: float, estimate: Estimate, say: Callable[[str], None] = lambda text: None
) -> list[Cost]:
    """Each rung of the paper's ladder on so many tokens, on one generation of TPU.

    Raises ValueError for an unknown generation.
    """
    require(chip in CHIPS, "--chip", chip, f"legal values are {choices(CHIPS)}")
    costs, can_compile = [], True
    for hidden in RUNGS:
        if can_compile:
            say(f"rung h{hidden}: compiling for {chip}")
        found = estimate(hidden, chip) if can_compile else None
        can_compile = found is not None
        mfu, note = (ASSUMED_MFU, "assumed") if found is None else found
        model = paper_rung(hidden, tokens).model
        compute = training_compute(model, tokens, LENGTH)
        if can_compile:
            say(f"rung h{hidden}: estimated MFU {mfu:.3f} on {note}")
        hours = compute.total / mfu / CHIPS[chip].peak_flops / 3600
        costs.append(Cost(hidden, model.head_dim, compute, mfu, hours, found is not None, note))
    return costs


def compile_rung(hidden: int, chip: str) -> tuple[float, str] | None:
    """The estimated MFU of a rung's step with the most sequences a chip that fit, by `bc2 estimate` in a process of its
    own; None where libtpu is not installed. Raises ValueError for a compile that fails otherwise."""
    topology, last = f"{chip}:{_SLICES[chip]}", ""
    for batch in _BATCHES:
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder, "figures.json")
            command = [
                *program_words("tools/aot_compile.py"), f"paper_h{hidden}",
                "--topology", topology, "--batch-per-chip", str(batch), "--json", str(figures),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if figures.exists():
                values = json.loads(figures.read_text(encoding="utf-8"))
                if values["hbm"]["share"] <= 0.95:
                    return values["estimated_mfu"], f"{topology}, {batch} sequences a chip"
                last = "it does not fit"
                continue
        last = (done.stderr.strip().splitlines() or [f"the compiler ended with {done.returncode}"])[-1]
        if "libtpu is not installed" in last:
            return None
        if "does not fit" not in last:
            break
    raise ValueError(f"rung h{hidden} can't be compiled for {topology}: {last}")


def choose(
    costs: Sequence[Cost], target: Point, law: Fit | None = None, noise: float = ASSUMED_NOISE, seed: int = 0
) -> list[Choice]:
    """All ladders of the smallest rungs, FEWEST_RUNGS and more, with what they cost and what they say of `target`.

    The truth of the simulated ladders is `law`, or ASSUMED_LAW; their runs scatter about it by `noise`.
    """
    rng, found = np.random.default_rng(seed), []
    a, b, floor = ASSUMED_LAW
    for count in range(FEWEST_RUNGS, len(costs) + 1):
        C = np.array([cost.compute.total for cost in costs[:count]])
        truth = a * C**b + floor if law is None else law.predict(C)
        widths = []
        for _ in range(_DRAWS):
            fit = fit_compute(C, truth * np.exp(noise * rng.standard_normal(count)), replicates=40, seed=seed)
            low, high = fit.interval(target.C)
            widths.append(high / low - 1)
        hours = sum(cost.chip_hours for cost in costs[:count])
        found.append(Choice(tuple(cost.hidden for cost in costs[:count]), hours, float(np.median(widths))))
    return found
