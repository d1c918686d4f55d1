"""Training health: metrics of the step about itself, and what the host concludes from them.

The first half is part of the jitted step. The second half counts skipped updates, decides when a run must stop, and
finds spikes of the loss. Its state is saved in the checkpoint's metadata, and its decisions follow from metrics that
are equal on all processes: they agree, and resuming is exact.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bc2_jax.config import HealthConfig
from bc2_jax.data.batch import FIELDS, Batch
from bc2_jax.model.baichuan import Params
from bc2_jax.train.expendable import Expendable

Tree = TypeVar("Tree")
CHECKED = ("loss", "grad_norm", "param_norm")
"""Metrics that must be finite. The step skips the update for the first two; the third may overflow after an update."""
EMPTY = "empty_batch"
"""Metric of a step: 1 if its batch had no target and so gave no update."""


# -------------------------------------------------------------------------------------------------- in the jitted step


def keep_unless(finite: Array, new: Tree, old: Tree) -> Tree:
    """`new` if the scalar bool `finite`, else `old`, bit for bit. No branch: it is fused into the update."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def batch_checksum(batch: Batch) -> Array:
    """uint32 scalar over all bits of a batch and their columns; independent of the order of rows.

    Fields are [A, B] or [A, B, ...] of 32-bit numbers, or [A]. Integer sums wrap and have no order, so the value is the
    same on every mesh and number of processes.
    """
    # Fields of one length are mixed first; FIELDS separately, since the mesh may shard their length.
    groups: dict[tuple[bool, int], Array] = {}
    for index, name in enumerate(sorted(batch, key=lambda name: (*FIELDS, name).index(name))):
        x = jax.lax.bitcast_convert_type(batch[name], jnp.uint32)
        x = x[:, None] if x.ndim == 1 else x
        x = x if x.ndim == 3 else x.reshape(*x.shape[:2], -1)
        group = name in FIELDS, x.shape[-1]
        groups[group] = groups.get(group, jnp.uint32(0)) * jnp.uint32(0x01000193) + (x ^ jnp.uint32(index))
    rows = jnp.uint32(0)
    for (_, length), mixed in groups.items():
        places = 2 * jax.lax.broadcasted_iota(jnp.uint32, (length,), 0) + 1
        rows += jnp.sum(mix(mixed) * places, axis=-1, dtype=jnp.uint32)
    return jnp.sum(mix(rows), dtype=jnp.uint32)


def mix(x: Array) -> Array:
    """The finalizer of MurmurHash3: every input bit changes half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def norm_metrics(params: Params, updates: Params, finite: Array) -> dict[str, Array]:
    """fp32 scalars: norm of the parameters after the step, and norm of the update over it."""
    param_norm = optax.tree.norm(params)
    ratio = jnp.where(finite, optax.tree.norm(updates) / param_norm, 0.0)
    return {"param_norm": param_norm, "update_ratio": ratio}


# --------------------------------------------------------------------------------------------------------- on the host


class Steps:
    """Iterates over the steps after `done` up to `last`; setting `done` rewinds it."""

    def __init__(self, done: int, last: int):
        self.done, self.last = done, last

    def __iter__(self) -> Iterator[int]:
        while self.done < self.last:
            self.done += 1
            yield self.done


class Spike(NamedTuple):
    """A range of steps, inclusive, whose losses are too high."""

    first: int
    last: int
    losses: list[float]

    @property
    def first_step(self) -> int:
        """The first step to discard: the loss of step `first` was computed with the parameters of the previous step,
        which therefore belongs to the spike."""
        return max(self.first - 1, 1)

    def __str__(self) -> str:
        return f"the loss is too high at steps {self.first} to {self.last}, {self.losses[-1]:.4f} at the last"


class SpikeDetector:
    """Finds losses far above the median of the preceding ones; `deviations` = 0 disables it."""

    def __init__(self, deviations: float, steps: int, window: int):
        self.deviations, self.steps, self.window = deviations, steps, window
        self.losses: deque[float] = deque(maxlen=window)
        self.high: list[float] = []
        """The current run of high losses; if it ends before it is a spike, they enter the window."""

    def push(self, loss: float) -> bool:
        """Adds the loss of the next step; returns whether it completes a spike."""
        if not self.deviations:
            return False
        if len(self.losses) == self.window:
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            # Losses that hardly vary have almost no spread.
            if loss > median + self.deviations * max(spread, 1e-3 * abs(median)):
                self.high.append(loss)
                return len(self.high) >= self.steps
        self.losses.extend([*self.high, loss])
        self.high = []
        return False


class HealthMonitor:
    """Judges the metrics of a run, step by step."""

    def __init__(self, config: HealthConfig, workdir: Path, say: Callable[[str], None], expendable: Expendable):
        self.config, self.workdir, self.say, self._expendable = config, workdir, say, expendable
        self.spike: Spike | None = None
        """The spike that the run must rewind from (`check_rewind`, `rewound`)."""
        self.stop: str | None = None
        """The metric that was not finite too often: the run must stop."""
        self.rewinds = self.skipped = self.skipped_in_a_row = 0
        self._detector = SpikeDetector(config.spike_deviations, config.spike_steps, config.spike_window)

    def state(self) -> dict[str, Any]:
        """For the checkpoint's metadata."""
        return {
            "skipped_updates": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "rewinds": self.rewinds,
            "losses": list(self._detector.losses), "high_losses": list(self._detector.high),
        }  # fmt: skip

    def set_state(self, state: dict[str, Any] | None) -> None:
        """Continues from the result of `state`; None, from a checkpoint without one, changes nothing."""
        if state is None:
            return
        self.skipped, self.skipped_in_a_row = state["skipped_updates"], state["skipped_in_a_row"]
        self.rewinds = state["rewinds"]
        self._set_losses(state)

    def _set_losses(self, state: dict[str, Any]) -> None:
        self._detector.losses = deque(state["losses"], maxlen=self.config.spike_window)
        self._detector.high = list(state["high_losses"])

    def observe(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Judges the metrics of a step and returns additional ones. May set `spike` or `stop`."""
        bad = [name for name in CHECKED if not math.isfinite(values.get(name, 0.0))]
        if bad:
            self.skipped += 1
            self.skipped_in_a_row += 1
            # A parameter that overflows after an update stays so: no later update can be good.
            if self.skipped_in_a_row > self.config.max_skipped_updates or bad[0] == "param_norm":
                self.stop = bad[0]
                self._record({"event": "stopped", "step": step, "metric": bad[0], "in_a_row": self.skipped_in_a_row})
            else:
                self._record({"event": "skipped update", "step": step, "in_a_row": self.skipped_in_a_row})
                self.say(
                    f"step {step}  {bad[0]} is {values[bad[0]]}: the update is skipped, {self.skipped_in_a_row} in a "
                    f"row of at most {self.config.max_skipped_updates}"
                )
        elif values.get(EMPTY):
            # Its loss is 0 and means nothing.
            self._record({"event": "empty batch", "step": step})
            self.say(f"step {step}  its batch has no target: no update")
        else:
            self.skipped_in_a_row = 0
            # The step in flight when the spike was found is discarded with it.
            if self.spike is None and self._detector.push(values["loss"]):
                self.spike = Spike(step - self.config.spike_steps + 1, step, list(self._detector.high))
        return {"skipped_updates": float(self.skipped)}

    def check_rewind(self, steps: list[int], directory: Path) -> None:
        """Raises FloatingPointError if the run may not rewind again, or no checkpoint of `steps` precedes the spike."""
        assert self.spike is not None
        good = max((step for step in steps if step < self.spike.first_step), default=None)
        if good is None:
            raise FloatingPointError(
                f"{self.spike}: the run stops; there is no checkpoint before step {self.spike.first_step}."
            )
        if self.rewinds >= self.config.max_rewinds:
            raise FloatingPointError(
                f"{self.spike}: the run stops after {self.rewinds} rewinds (health.max_rewinds); the last good "
                f"checkpoint is {directory / str(good)}."
            )

    def rewound(self, good: int, state: dict[str, Any] | None, skipped: dict[str, Any]) -> None:
        """Call after a rewind to the checkpoint of step `good`, with its `state`; `skipped` is the result of
        `Batches.skip`."""
        assert self.spike is not None
        spike, self.spike = self.spike, None
        self._set_losses(state or {"losses": [], "high_losses": []})
        self.rewinds += 1
        self._record({"event": "rewind", "step": spike.last, "to": good, "losses": spike.losses, **skipped})
        self.say(
            f"{spike}: rewound to the checkpoint of step {good}; the {skipped['rows']} rows of steps "
            f"{spike.first_step} to {spike.last} are skipped (rewind {self.rewinds} of {self.config.max_rewinds})"
        )

    def _record(self, event: dict[str, Any]) -> None:
        """Appends to WORKDIR/health.jsonl, which keeps its lines when metrics.jsonl is truncated."""
        if jax.process_index() == 0:
            with (
                self._expendable.attempt("health"),
                (self.workdir / "health.jsonl").open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps({"time": time.time(), **event}) + "\n")
