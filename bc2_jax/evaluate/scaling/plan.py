"""Plans a ladder: its cost in chip-hours and the width of its prediction interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from bc2_jax.aot.search import run_aot_compile
from bc2_jax.evaluate.scaling.collection import Point
from bc2_jax.evaluate.scaling.fit import Fit, fit_compute
from bc2_jax.evaluate.scaling.flops import Compute, training_compute
from bc2_jax.evaluate.scaling.ladder import LENGTH, RUNGS, paper_rung
from bc2_jax.tpu.chips import CHIPS
from bc2_jax.validation import choices, require

ASSUMED_MFU = 0.4  # if nothing can be compiled
ASSUMED_LAW = (85.0, -0.082, 1.58)
"""a, b, L_inf of simulated ladders if no runs are given; 2.67 nats per token at 10^23 FLOPs."""
ASSUMED_NOISE = 0.001
"""Relative standard deviation of a run's loss about the law: two seeds differ by 0.02 to 0.03 %, runs of a ladder
deviate from any law by several times that."""
FEWEST_RUNGS = 4
_DRAWS = 12
_BATCHES = (8, 4, 2, 1)  # sequences per chip to try
# A rung is compiled for a small slice.
_SLICES = {"v4": "2x2x1", "v5e": "2x4", "v5p": "2x2x1", "v6e": "2x4", "tpu7x": "2x2x1"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a rung."""

    hidden: int
    head_size: int
    compute: Compute
    mfu: float  # estimated at compile time, or assumed
    chip_hours: float
    is_compiled: bool
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A ladder of the smallest rungs."""

    rungs: tuple[int, ...]
    chip_hours: float
    width: float  # high / low - 1 of the target's 95 % interval, median over simulated ladders


Estimate = Callable[[int, str], tuple[float, str] | None]
"""(hidden size, generation) -> (MFU, topology and batch), or None if nothing can be compiled."""


def cost_rungs(
    chip: str, tokens: float, estimate: Estimate, say: Callable[[str], None] = lambda text: None
) -> list[Cost]:
    """The costs of the paper's ladder on `tokens`, on a TPU generation. Raises ValueError for an unknown one."""
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
    """The estimated MFU of a rung's step with the most sequences a chip that fit; None where libtpu is not installed.

    Raises ValueError if the compilation fails for another reason.
    """
    topology, config = f"{chip}:{_SLICES[chip]}", f"paper_h{hidden}"
    problem = ""
    for batch in _BATCHES:
        values = run_aot_compile([config, "--topology", topology, "--batch-per-chip", str(batch)])
        if "error" not in values and values["hbm"]["share"] <= 0.95:
            return values["estimated_mfu"], f"{topology}, {batch} sequences a chip"
        problem = values.get("error", "it does not fit")
        if "libtpu is not installed" in problem:
            return None
        if "does not fit" not in problem:
            break
    raise ValueError(f"rung h{hidden} can't be compiled for {topology}: {problem}")


def choose(
    costs: Sequence[Cost], target: Point, law: Fit | None = None, noise: float = ASSUMED_NOISE, seed: int = 0
) -> list[Choice]:
    """Ladders of the smallest FEWEST_RUNGS and more rungs, with cost and the interval of `target`.

    Simulated runs scatter by `noise` about `law` (default ASSUMED_LAW).
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
