"""The batches of a run over packed rows: in the order of its steps, with skipped rows and recent batches kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bc2_jax.config import DataConfig
from bc2_jax.data.batch import Batch, Rows, batch_part, make_put
from bc2_jax.data.loader import make_train_iterator, make_train_loader, make_validation_batches
from bc2_jax.data.row_file import BadRows

if TYPE_CHECKING:
    import grain

BATCHES_KEPT = 3
"""The metrics of a step are known after the next batch was placed and the one after that may be loaded."""


def no_fields(rows: Rows) -> Rows:
    """No fields beyond FIELDS."""
    return {}


def save_batch(folder: Path, step: int, rows: Rows, about: dict[str, Any], suffix: str = "") -> Path:
    """Writes the rows of a step and the values `about` it to FOLDER/bad_batch_step_STEP{suffix}.npz."""
    path = folder / f"bad_batch_step_{step}{suffix}.npz"
    np.savez(path, **rows, **{"step": step, **about})  # type: ignore[arg-type]  # the stub takes a name for a flag
    return path


class RowBatches:
    """`Batches` of `bc2_jax.train.job`: this process's part of the training rows of `data`.

    The rows of a run are numbered from 0. Its position and the skipped rows are kept in rows, so that it resumes with
    the next row after a change of the batch size.
    """

    def __init__(
        self, data: DataConfig, mesh: Mesh, num_steps: int, bad_rows: BadRows, done: tuple[int, int] = (0, 0),
        complete: Callable[[int, Batch], Batch] = lambda step, batch: batch,
        fields: Callable[[Rows], Rows] = no_fields,
    ):  # fmt: skip
        """Raises as `make_train_loader` for a run that has `done` (steps, rows). `fields` gives further fields of rows,
        [b, W] each; `complete` makes the batch of a step from the fields of its rows."""
        part = batch_part(mesh, jax.process_index())
        self._make_loader = functools.partial(
            make_train_loader, data, process_index=part.process_index, process_count=part.process_count,
            bad_rows=bad_rows,
        )  # fmt: skip
        self._size, self._length, self._bad_rows = data.global_batch_size, data.sequence_length, bad_rows
        self._offset = 0
        self._iterator = make_train_iterator(self._make_loader(num_steps=num_steps, done=done))
        self._put, self._complete, self._fields = make_put(data, mesh), complete, fields
        self._stretches = [Stretch(1, 0, self._size)]
        self._next_row = 0
        self._windows: list[tuple[int, int]] = []
        self._recent: dict[int, Rows] = {}

    def next(self, step: int, state: object = None) -> Batch:
        """The batch of a step on the mesh; the training `state` does not matter."""
        if self._stretches[-1].size != self._size:
            self._stretches.append(Stretch(step, self._next_row, self._size))
        row = row_of_step(step, self._stretches, self._windows)
        if row % self._size != self._offset:
            self._offset = row % self._size
            self._iterator.close()
            self._iterator = make_train_iterator(self._make_loader(first_row=self._offset))
        index = row // self._size
        if self._iterator.get_state()["next_index"] != index:
            self._iterator.set_state({"next_index": index})
        rows = next(self._iterator)
        rows = rows | self._fields(rows)
        self._next_row = row + self._size
        self._recent[step] = rows
        for old in [s for s in self._recent if s <= step - BATCHES_KEPT]:
            del self._recent[old]
        return self._complete(step, self._put(rows))

    def position(self) -> dict[str, Any]:
        """The next row, the rows trained on so far, and what `row_of_step` needs, as JSON values."""
        left_out = sum(max(min(stop, self._next_row) - first, 0) for first, stop in self._windows)
        return {
            "next_row": self._next_row, "rows": self._next_row - left_out, "row_tokens": self._length,
            "batch_sizes": [list(stretch) for stretch in self._stretches],
            "skipped_rows": [list(window) for window in self._windows],
        }  # fmt: skip

    def seek(self, position: dict[str, Any]) -> None:
        position = in_rows(position)
        before, now = position["row_tokens"], self._length  # rows of another length: the same place in the text
        self._next_row = next_row(position, now)
        windows = [(first * before // now, stop * before // now) for first, stop in position["skipped_rows"]]
        self._windows = merge([*self._windows, *windows])
        self._stretches = [Stretch(step, row * before // now, size) for step, row, size in position["batch_sizes"]]
        self._recent.clear()

    def skip(self, first: int, last: int) -> dict[str, Any]:
        start, end = (row_of_step(step, self._stretches, self._windows) for step in (first, last))
        window = start, end + self._size
        rows = (last - first + 1) * self._size
        self._windows = merge([*self._windows, window])
        return {"skipped_rows": list(window), "rows": rows}

    def metrics(self, step: int) -> dict[str, float]:
        """The first row of a step's batch; bad rows, and rows skipped by all processes, if there are any."""
        values = {"first_row": float(row_of_step(step, self._stretches, self._windows))} if step else {}
        if self._windows:
            values["skipped_rows"] = float(sum(stop - first for first, stop in self._windows))
        return values | self._bad_rows.metrics()

    def save(self, step: int, folder: Path, about: dict[str, Any]) -> Path | None:
        """Writes FOLDER/bad_batch_step_STEP.npz for tools/replay.py."""
        if step not in self._recent:
            return None
        suffix = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        about = {"first_row": row_of_step(step, self._stretches, self._windows), **about}
        return save_batch(folder, step, self._recent[step], about, suffix)

    def close(self) -> None:
        self._iterator.close()


class ValidationBatches(Sequence[Batch]):
    """All held-out rows once, as batches that are placed on the mesh on demand."""

    def __init__(
        self, data: DataConfig, mesh: Mesh, bad_rows: BadRows, fields: Callable[[Rows], Rows] = no_fields
    ):  # fmt: skip
        """Raises as `make_validation_batches`; `fields` as those of `RowBatches`."""
        part = batch_part(mesh, jax.process_index())
        self._rows: grain.MapDataset[Rows] = make_validation_batches(
            data, data.global_batch_size, bad_rows=bad_rows, process_index=part.process_index,
            process_count=part.process_count,
        )  # fmt: skip
        self._put, self._fields = make_put(data, mesh), fields

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows[index]
        return self._put(rows | self._fields(rows))


class Stretch(NamedTuple):
    """Steps with batches of one size: the first step, its first row, and the rows of a batch."""

    step: int
    row: int
    size: int


def row_of_step(step: int, stretches: Sequence[Stretch], windows: Sequence[tuple[int, int]]) -> int:
    """The first row of the batch of a step when the rows [first, stop) of the sorted `windows` are skipped.

    A batch has consecutive rows: rows before a window that do not fill a batch are skipped too.
    """
    stretch = next((s for s in reversed(stretches) if s.step <= step), stretches[0])
    batches, row = step - stretch.step, stretch.row
    for first, stop in windows:
        if stop <= row:
            continue
        before = max(first - row, 0) // stretch.size
        if batches < before:
            break
        batches, row = batches - before, stop
    return row + batches * stretch.size


def next_row(position: dict[str, Any], sequence_length: int) -> int:
    """The row with which a run resumes from a position of `RowBatches`."""
    position = in_rows(position)
    return position["next_row"] * position["row_tokens"] // sequence_length


def in_rows(position: dict[str, Any]) -> dict[str, Any]:
    """A position in today's format; earlier versions saved it in batches of one size."""
    if "next_row" in position:
        return position
    size, windows = position["batch_size"], position.get("skipped_batches", ())
    return {
        "next_row": position["next_index"] * size, "row_tokens": position["row_tokens"], "batch_sizes": [[1, 0, size]],
        "skipped_rows": [[first * size, stop * size] for first, stop in windows],
    }  # fmt: skip


def merge(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The windows in order; those that touch or overlap become one."""
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((first, stop))
    return merged
