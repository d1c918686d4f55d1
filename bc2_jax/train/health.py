"""Whether training goes well: what the step measures of itself, and what the host makes of it.

The first half is part of the jitted step. The second watches its metrics: it counts skipped updates, stops the run and
saves the batch, and finds spikes of the loss. All of its state travels in the checkpoint's metadata, and all of its
decisions follow from metrics that are the same on every process, so that processes agree and resuming is exact.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bc2_jax.agreement import first_decides
from bc2_jax.config import TrainConfig
from bc2_jax.model.baichuan import Params

if TYPE_CHECKING:
    import grain

    from bc2_jax.checkpoint import Checkpointer

Tree = TypeVar("Tree")
CHECKED = ("loss", "grad_norm", "param_norm")
"""Metrics that must be finite. The step skips the update for the first two; the third may overflow after an update."""
BATCHES_KEPT = 3
"""The metrics of a step are known when the batch after it is placed and the one after that may be at hand."""
FIELDS = ("input_ids", "labels", "segment_ids", "positions")


# -------------------------------------------------------------------------------------------------- in the jitted step


def keep_unless(finite: Array, new: Tree, old: Tree) -> Tree:
    """`new` if the scalar bool `finite`, else `old`, bit for bit. Without a branch: it is fused into the update."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def batch_checksum(batch: dict[str, Array]) -> Array:
    """uint32 scalar of all bits of a batch [..., T] and of their places in the rows; the order of rows does not count.

    Sums of integers wrap and have no order: the value is the same on every mesh and number of processes.
    """
    places = 2 * jax.lax.broadcasted_iota(jnp.uint32, (batch["labels"].shape[-1],), 0) + 1
    mixed = jnp.uint32(0)
    for index, name in enumerate(FIELDS):
        mixed = mixed * jnp.uint32(0x01000193) + (batch[name].astype(jnp.uint32) ^ jnp.uint32(index))
    rows = jnp.sum(_mix(mixed) * places, axis=-1, dtype=jnp.uint32)
    return jnp.sum(_mix(rows), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3: every bit of the input changes half of the output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def norm_metrics(params: Params, updates: Params, finite: Array) -> dict[str, Array]:
    """fp32 scalars: norm of the parameters after the step, of the update over it, and of the head's rows (before
    NormHead makes them one)."""
    param_norm = optax.tree.norm(params)
    squares_V = jnp.sum(jnp.square(params["lm_head"]["weight"]), axis=-1)
    return {
        "param_norm": param_norm,
        "update_ratio": jnp.where(finite, optax.tree.norm(updates) / param_norm, 0.0),
        "head_row_norm_min": jnp.sqrt(jnp.min(squares_V)),
        "head_row_norm_max": jnp.sqrt(jnp.max(squares_V)),
        "head_row_norm_mean": jnp.mean(jnp.sqrt(squares_V)),
    }


# --------------------------------------------------------------------------------------------------------- on the host


class Steps:
    """Counts from the step after `done` to `last`, and can be set back meanwhile."""

    def __init__(self, done: int, last: int):
        self.done, self.last = done, last

    def __iter__(self) -> Iterator[int]:
        while self.done < self.last:
            self.done += 1
            yield self.done


class Spike(NamedTuple):
    """Steps whose losses are too high, both included."""

    first: int
    last: int
    losses: list[float]


class SpikeDetector:
    """Finds losses far above the median of those before; `deviations` = 0 finds none."""

    def __init__(self, deviations: float, steps: int, window: int):
        self.deviations, self.steps, self.window = deviations, steps, window
        self.losses: deque[float] = deque(maxlen=window)
        self.high: list[float] = []
        """The high losses in a row up to now; they enter the window if they end before they are a spike."""

    def push(self, loss: float) -> bool:
        """Takes the loss of the next step; whether a spike is complete with it."""
        if not self.deviations:
            return False
        if len(self.losses) == self.window:
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            # Losses that hardly move have no spread to speak of.
            if loss > median + self.deviations * max(spread, 1e-3 * abs(median)):
                self.high.append(loss)
                return len(self.high) >= self.steps
        self.losses.extend([*self.high, loss])
        self.high = []
        return False


class HealthMonitor:
    """Watches the metrics of one run."""

    def __init__(self, config: TrainConfig, workdir: Path, say: Callable[[str], None]):
        self.config, self.health, self.workdir, self.say = config, config.health, workdir, say
        self.spike: Spike | None = None
        """What the loop has to go back behind, with `rewind`."""
        self.windows: list[tuple[int, int]] = []
        """Batches [first, stop), counted as the loader does, that are left out; in order and apart."""
        self.rewinds = self.skipped = self.skipped_in_a_row = 0
        self._batches: dict[int, dict[str, np.ndarray]] = {}
        self._detector = SpikeDetector(self.health.spike_deviations, self.health.spike_steps, self.health.spike_window)

    def state(self) -> dict[str, Any]:
        """For the checkpoint's metadata."""
        return {
            "skipped_updates": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "rewinds": self.rewinds,
            "skipped_batches": [list(window) for window in self.windows],
            "losses": list(self._detector.losses), "high_losses": list(self._detector.high),
        }  # fmt: skip

    def set_state(self, state: dict[str, Any] | None) -> None:
        """Goes on from what `state` gave; None, of a checkpoint that has none, is a run in which nothing happened."""
        if state is None:
            return
        self.skipped, self.skipped_in_a_row = state["skipped_updates"], state["skipped_in_a_row"]
        self.rewinds = state["rewinds"]
        self.windows = [(first, stop) for first, stop in state["skipped_batches"]]
        self._set_losses(state)

    def _set_losses(self, state: dict[str, Any]) -> None:
        self._detector.losses = deque(state["losses"], maxlen=self.health.spike_window)
        self._detector.high = list(state["high_losses"])

    # ----------------------------------------------------------------------------------------------- data

    def data_index(self, step: int) -> int:
        """The loader's number of the batch of a step: one less than the step, and ahead by what was left out."""
        index = step - 1
        for first, stop in self.windows:
            index += (stop - first) if index >= first else 0
        return index

    @property
    def skipped_rows(self) -> int:
        """Of all processes."""
        return sum(stop - first for first, stop in self.windows) * self.config.data.global_batch_size

    def next_batch(self, step: int, iterator: grain.DatasetIterator) -> dict[str, np.ndarray]:
        """This process's rows of a step, read from an iterator that stands where the step before left it."""
        state, index = iterator.get_state(), self.data_index(step)
        if state["next_index"] != index:
            iterator.set_state(state | {"next_index": index})
        batch = next(iterator)
        self._batches[step] = batch
        for old in [s for s in self._batches if s <= step - BATCHES_KEPT]:
            del self._batches[old]
        return batch

    def save_batch(self, step: int, values: dict[str, float]) -> Path | None:
        """Writes the batch of a step with what tools/replay.py needs; None if it is not at hand any more."""
        if step not in self._batches:
            return None
        suffix = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.workdir / f"bad_batch_step_{step}{suffix}.npz"
        about = {"step": step, "seed": self.config.seed, "data_index": self.data_index(step)}
        # NaN has no place in JSON: here the bits are kept.
        metrics = {f"metric_{name}": np.float64(value) for name, value in values.items()}
        np.savez(path, **self._batches[step], **about, **metrics)  # type: ignore[arg-type]
        return path

    # -------------------------------------------------------------------------------------------- metrics

    def observe(self, step: int, values: dict[str, float], describe_newest: Callable[[], str]) -> dict[str, float]:
        """Checks the metrics of a step; returns what there is to add to them. Sets `spike` where there is one.

        Raises FloatingPointError, with the batch saved, if too many updates were skipped; `describe_newest` then says
        which checkpoint is good.
        """
        bad = [name for name in CHECKED if not math.isfinite(values.get(name, 0.0))]
        if bad:
            self.skipped += 1
            self.skipped_in_a_row += 1
            # An update that makes the parameters overflow is done when it is known; no later one can be good.
            if self.skipped_in_a_row > self.health.max_skipped_updates or bad[0] == "param_norm":
                self._stop(step, values, bad[0], describe_newest())
            self._record({"event": "skipped update", "step": step, "in_a_row": self.skipped_in_a_row})
            self.say(
                f"step {step}  {bad[0]} is {values[bad[0]]}: the update is skipped, {self.skipped_in_a_row} in a row "
                f"of at most {self.health.max_skipped_updates}"
            )
        else:
            self.skipped_in_a_row = 0
            # A step that was under way when the spike was found is gone with it.
            if self.spike is None and self._detector.push(values["loss"]):
                self.spike = Spike(step - self.health.spike_steps + 1, step, list(self._detector.high))
        counts = {"skipped_updates": float(self.skipped)}
        if self.windows:
            counts |= {"skipped_rows": float(self.skipped_rows), "data_index": float(self.data_index(step))}
        return counts

    def _stop(self, step: int, values: dict[str, float], name: str, where: str) -> None:
        path = self.save_batch(step, values)
        if path is not None:
            where += f"; its batch is saved in {path}"
        self._record({"event": "stopped", "step": step, "metric": name, "in_a_row": self.skipped_in_a_row})
        raise FloatingPointError(f"{name} is {values[name]} at step {step}: the run stops; {where}.")

    def _record(self, event: dict[str, Any]) -> None:
        """Appends to WORKDIR/health.jsonl, which stays when the lines of metrics.jsonl are written anew."""
        if jax.process_index() == 0:
            with (self.workdir / "health.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **event}) + "\n")

    # --------------------------------------------------------------------------------------------- rewind

    def rewind(self, checkpointer: Checkpointer) -> int:
        """The step of the checkpoint to go back to; forgets the spike, and leaves out its rows from now on.

        The high loss of the first step was computed with the parameters after the step before: that step is part of
        the spike, and no checkpoint from it on is used; they are set aside. Rows between the checkpoint and the spike
        are read again, in their order. Raises FloatingPointError if the run may not go back again, or cannot. All
        processes call it.
        """
        assert self.spike is not None
        first, last, losses = max(self.spike.first - 1, 1), self.spike.last, self.spike.losses
        checkpointer.wait()
        steps = first_decides(checkpointer.steps)
        good = max((step for step in steps if step < first), default=None)
        what = f"the loss is too high at steps {self.spike.first} to {last}, {losses[-1]:.4f} at the last"
        if good is None:
            raise FloatingPointError(f"{what}: the run stops; there is no checkpoint before step {first}.")
        if self.rewinds >= self.health.max_rewinds:
            raise FloatingPointError(
                f"{what}: the run stops after {self.rewinds} rewinds (health.max_rewinds); the last good checkpoint is "
                f"{checkpointer.directory / str(good)}."
            )
        window = self.data_index(first), self.data_index(last) + 1
        checkpointer.set_aside_after(first - 1)
        good = checkpointer.latest_good() or 0  # raises where none is good
        self._set_losses(checkpointer.metadata(good).get("health", {"losses": [], "high_losses": []}))
        rows = (last - first + 1) * self.config.data.global_batch_size
        self.windows = _merge([*self.windows, window])
        self.rewinds, self.spike = self.rewinds + 1, None
        self._batches.clear()
        self._record(
            {"event": "rewind", "step": last, "to": good, "losses": losses, "skipped_batches": window, "rows": rows}
        )
        self.say(
            f"{what}: back to the checkpoint of step {good}; the {rows} rows of steps {first} to {last} are left out "
            f"(rewind {self.rewinds} of at most {self.health.max_rewinds})"
        )
        return good


def _merge(windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same batches in order, windows that touch or overlap made one."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((first, stop))
    return merged
