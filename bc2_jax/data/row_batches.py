"""The batches of a run that reads packed rows: in the order of its steps, some left out, recent ones at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from bc2_jax.config import DataConfig
from bc2_jax.data.bad_rows import BadRows
from bc2_jax.data.batch import Batch, Rows, batch_part, make_put
from bc2_jax.data.loader import make_train_iterator, make_train_loader, make_validation_batches

if TYPE_CHECKING:
    import grain

BATCHES_KEPT = 3
"""The metrics of a step are known when the batch after it is placed and the one after that may be at hand."""


class RowBatches:
    """`Batches` of `bc2_jax.train.job` from the training rows of `data`, this process's part of them.

    The loader numbers batches from 0; the batch of a step is one less than the step, and ahead by what was left out.
    """

    def __init__(self, data: DataConfig, mesh: Mesh, num_steps: int, bad_rows: BadRows):
        """Raises as `make_train_loader`."""
        part = batch_part(mesh, jax.process_index())
        self._loader = make_train_loader(
            data, num_steps=num_steps, bad_rows=bad_rows, process_index=part.process_index,
            process_count=part.process_count,
        )  # fmt: skip
        self._iterator = make_train_iterator(self._loader)
        self._put, self._rows_per_batch, self._bad_rows = make_put(data, mesh), data.global_batch_size, bad_rows
        self._windows: list[tuple[int, int]] = []
        self._recent: dict[int, Rows] = {}

    def next(self, step: int, state: object = None) -> Batch:
        """The batch of a step on the mesh; rows do not depend on the training `state`."""
        position, index = self._iterator.get_state(), data_index(step, self._windows)
        if position["next_index"] != index:
            self._iterator.set_state(position | {"next_index": index})
        rows = next(self._iterator)
        self._recent[step] = rows
        for old in [s for s in self._recent if s <= step - BATCHES_KEPT]:
            del self._recent[old]
        return self._put(rows)

    def position(self) -> dict[str, Any]:
        return self._iterator.get_state() | {"skipped_batches": [list(window) for window in self._windows]}

    def seek(self, position: dict[str, Any]) -> None:
        windows = [(first, stop) for first, stop in position.get("skipped_batches", ())]
        self._windows = merge([*self._windows, *windows])
        self._iterator.set_state({name: value for name, value in position.items() if name != "skipped_batches"})
        self._recent.clear()

    def skip(self, first: int, last: int) -> dict[str, Any]:
        window = data_index(first, self._windows), data_index(last, self._windows) + 1
        self._windows = merge([*self._windows, window])
        return {"skipped_batches": list(window), "rows": (last - first + 1) * self._rows_per_batch}

    def metrics(self, step: int) -> dict[str, float]:
        """Rows that were bad; if batches were left out, rows left out by all processes and the number of the batch."""
        values = self._bad_rows.metrics()
        if self._windows:
            left_out = sum(stop - first for first, stop in self._windows)
            values |= {
                "skipped_rows": float(left_out * self._rows_per_batch),
                "data_index": float(data_index(step, self._windows)),
            }
        return values

    def save(self, step: int, folder: Path, about: dict[str, Any]) -> Path | None:
        """Writes FOLDER/bad_batch_step_STEP.npz for tools/replay.py."""
        if step not in self._recent:
            return None
        suffix = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = folder / f"bad_batch_step_{step}{suffix}.npz"
        about = {"step": step, "data_index": data_index(step, self._windows), **about}
        np.savez(path, **self._recent[step], **about)  # type: ignore[arg-type]  # the stub takes a name for a flag
        return path

    def close(self) -> None:
        self._iterator.close()


class ValidationBatches(Sequence[Batch]):
    """All held-out rows once, as batches that are placed on the mesh when they are asked for."""

    def __init__(self, data: DataConfig, mesh: Mesh, bad_rows: BadRows):
        """Raises as `make_validation_batches`."""
        part = batch_part(mesh, jax.process_index())
        self._rows: grain.MapDataset[Rows] = make_validation_batches(
            data, data.global_batch_size, bad_rows=bad_rows, process_index=part.process_index,
            process_count=part.process_count,
        )  # fmt: skip
        self._put = make_put(data, mesh)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._put(self._rows[index])


def data_index(step: int, windows: Sequence[tuple[int, int]]) -> int:
    """The loader's number of the batch of a step where the batches [first, stop) of `windows` are left out."""
    index = step - 1
    for first, stop in windows:
        index += (stop - first) if index >= first else 0
    return index


def merge(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same batches in order, windows that touch or overlap made one."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((first, stop))
    return merged
