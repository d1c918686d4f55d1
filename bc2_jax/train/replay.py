"""Recorded steps done again from a checkpoint, and compared bit for bit: bad hardware or bad data?

JSON keeps the metrics of metrics.jsonl exactly (Python writes the shortest text that gives the same number), so each
line is a fingerprint of its step: of the batch as the devices had it, the loss, the gradients, the new parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bc2_jax.checkpoint import load_state
from bc2_jax.config import DistributedConfig, RunConfig, TrainConfig
from bc2_jax.convert.checkpoints import newest_checkpoint
from bc2_jax.convert.pretrained import find_model
from bc2_jax.data.batch import FIELDS, Batch, batch_part, make_put
from bc2_jax.data.loader import make_train_loader
from bc2_jax.manifest import verify
from bc2_jax.metadata import is_complete, read_metadata, read_training_metadata
from bc2_jax.model.baichuan import Params
from bc2_jax.sharding import make_mesh
from bc2_jax.terminal import make_console
from bc2_jax.train import distributed
from bc2_jax.train.expendable import Expendable
from bc2_jax.train.job import StepParts, TrainState, TrainStep, lower_train_step
from bc2_jax.train.kinds import kind_of, read_config
from bc2_jax.train.loop import Start
from bc2_jax.train.metrics import fingerprint, read_metrics
from bc2_jax.train.restore import restore_state
from bc2_jax.train.start import check_attention, tuned_options
from bc2_jax.validation import require


class Comparison(NamedTuple):
    """One recorded step against the same step done again."""

    step: int
    compared: dict[str, tuple[float | str | None, float | str]]
    """Name -> (recorded, now); a recorded None is a value that was not finite."""

    @property
    def different(self) -> list[str]:
        return [name for name, (recorded, now) in self.compared.items() if not _same(recorded, now)]


def _same(recorded: float | str | None, now: float | str) -> bool:
    if isinstance(now, str) or isinstance(recorded, str):
        return recorded == now
    if recorded is None or math.isnan(recorded):
        return not math.isfinite(now) if recorded is None else math.isnan(now)
    return recorded == now


class Folder(NamedTuple):
    """A checkpoint to read; unlike a Checkpointer it leaves the folders of a run that goes on alone."""

    path: Path

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
        verify(self.path)
        return load_state(self.path, params, opt_state)


def choose_checkpoint(path: str | Path, step: int) -> Path:
    """The newest complete checkpoint before `step` of a run, or the one that `path` is."""
    path = Path(path).absolute()
    folder = path / "checkpoints"
    if folder.is_dir():
        earlier = [p for p in folder.iterdir() if p.name.isdigit() and int(p.name) < step and is_complete(p)]
        if not earlier:
            raise ValueError(f"--step = {step} is not valid: {path} has no checkpoint before it.")
        return max(earlier, key=lambda p: int(p.name))
    found = newest_checkpoint(path) or find_model(path).path  # which says what is there instead
    if not found.name.isdigit() or int(found.name) >= step or not (found / "opt_state").is_dir():
        raise ValueError(f"--step = {step} is not valid: {found} must be a training checkpoint of a step before it.")
    return found


def recorded_config(checkpoint: Path, step: int, last: RunConfig) -> RunConfig:
    """The config with which `step` was done: a run may go on from `checkpoint` with another than it was saved with.

    It is in the next checkpoint; where there is none it is `last`, that of the last start.
    """
    later = [p for p in checkpoint.parent.iterdir() if p.name.isdigit() and int(p.name) >= step and is_complete(p)]
    if not later:
        return last
    return read_config(read_metadata(min(later, key=lambda p: int(p.name)))["config"])


def _on_these_devices(config: RunConfig) -> RunConfig:
    """On a pod the processes find each other again; simulated devices of several processes become those of one."""
    devices = config.mesh.num_cpu_devices * (config.distributed.num_processes or 1)
    mesh = dataclasses.replace(config.mesh, num_cpu_devices=devices)
    return dataclasses.replace(config, distributed=DistributedConfig(), mesh=mesh)


def load_batch(paths: Sequence[str | Path], step: int) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """(rows of each file, metrics) that a run saved of a step. Raises ValueError for files of something else."""
    parts = []
    for path in paths:
        with np.load(path, allow_pickle=False) as file:  # data: nothing in it is executed
            parts.append(dict(file))
        missing = sorted({*FIELDS, "step"} - set(parts[-1]))
        if missing or int(parts[-1]["step"]) != step:
            reason = f"it has no {missing[0]}" if missing else f"it is of step {int(parts[-1]['step'])}, not {step}"
            raise ValueError(f"--batch = {str(path)!r} is not valid: {reason}.")
    metrics = {name.removeprefix("metric_"): float(x) for name, x in parts[0].items() if name.startswith("metric_")}
    # What is beside the rows is numbers of the step.
    return [{name: x for name, x in part.items() if x.ndim == 2} for part in parts], metrics


def replay(path: str | Path, step: int, batch: Sequence[str | Path] = ()) -> Iterator[Comparison]:
    """Does the steps from the newest checkpoint before `step` up to it again, yielding each compared with its record.

    Rows come from the loader, those of `step` itself from the files `batch` if given. If a checkpoint of `step` exists
    its parameters are compared too (SHA-256). Nothing is written. Raises ValueError or FileNotFoundError, before any
    step, if the checkpoint, the record or as many devices as the run had are not there.
    """
    checkpoint = choose_checkpoint(path, step)
    run, start = checkpoint.parent.parent, int(checkpoint.name)
    saved = load_batch(batch, step) if batch else None
    try:
        last = read_config(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{run / 'config.json'} is damaged or of another version: {str(error).rstrip('.')}."
        ) from error
    distributed.start(_on_these_devices(last))  # before Orbax asks JAX for devices
    config = _on_these_devices(recorded_config(checkpoint, step, last))
    config = dataclasses.replace(config, workdir=str(run))  # it may have been moved; what it keeps is there
    records = {line["step"]: line for line in read_metrics(run / "metrics.jsonl")}
    if saved is not None and step not in records:
        records[step] = saved[1]
    for needed in range(start + 1, step + 1):
        if needed not in records:
            raise ValueError(f"--step = {step} is not valid: step {needed} is not recorded in {run / 'metrics.jsonl'}.")
    config = config.resolve(jax.device_count())
    mesh = make_mesh(config.mesh)
    check_attention(config, mesh)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as scratch:
        parts: StepParts = kind_of(config).make_step(config, mesh)
        if isinstance(config, TrainConfig):
            frozen, next_batch = parts.load_frozen(), _reader(config, mesh, parts, records, saved, step)
        else:
            legal = f"a {type(config).__name__} makes its batches itself and reads none: leave it out"
            require(saved is None, "--batch", list(map(str, batch)), legal)
            frozen, next_batch = _maker(config, mesh, checkpoint, Path(scratch))
        state = restore_state(Folder(checkpoint), start, parts.state)
        train_step: TrainStep | None = None
        for now in range(start + 1, step + 1):
            record, placed = records[now], next_batch(now, state)
            if train_step is None:
                lowered = lower_train_step(
                    parts.objective, parts.optimizer, state, frozen, placed, norms=config.health.norms,
                    updates=parts.updates,
                )  # fmt: skip
                train_step = lowered.compile(compiler_options=tuned_options(config, mesh))
            state, metrics = train_step(state, frozen, placed)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            compared: dict[str, tuple[float | str | None, float | str]] = {
                name: (record[name], value) for name, value in values.items() if name in record
            }
            after = checkpoint.parent / str(now)
            if now == step and is_complete(after):
                then = restore_state(Folder(after), now, parts.state)
                compared["parameters sha256"] = fingerprint(then.params), fingerprint(state.params)
            yield Comparison(now, compared)


NextBatch = Callable[[int, TrainState], Batch]
"""(step, state before it) -> its batch, as the run had it."""


def _reader(
    config: TrainConfig, mesh: Mesh, parts: StepParts, records: dict[int, dict[str, Any]],
    saved: tuple[list[dict[str, np.ndarray]], dict[str, float]] | None, last: int,
) -> NextBatch:  # fmt: skip
    """Of a run on rows: those that its record names; of the step `last` those that were saved, if they were."""
    part, put = batch_part(mesh, jax.process_index()), make_put(config.data, mesh)
    make_loader = functools.cache(
        functools.partial(
            make_train_loader, config.data, process_index=part.process_index, process_count=part.process_count
        )
    )
    size = config.data.global_batch_size

    def next_batch(now: int, state: TrainState) -> Batch:
        # Earlier versions recorded the number of the batch, where it was not the step's.
        first = int(records[now].get("first_row", records[now].get("data_index", now - 1) * size))
        rows = make_loader(first_row=first % size)[first // size]
        rows = rows | parts.fields(rows)
        if saved is not None and now == last:
            rows = _own_rows(saved[0], len(rows["labels"]))
        return parts.complete(now, put(rows))

    return next_batch


def _maker(config: RunConfig, mesh: Mesh, checkpoint: Path, scratch: Path) -> tuple[Params, NextBatch]:
    """(frozen parameters, batches) of a run that makes them from its own parameters; what it writes meanwhile goes to
    `scratch`, and its own folder stays as it is."""
    step = int(checkpoint.name)
    metadata = read_training_metadata(checkpoint)
    console = make_console(quiet=True)
    start = Start(mesh, scratch, step, metadata, console, console.print, "", Expendable())
    job = kind_of(config).make_job(config, start)
    job.batches.seek(metadata.data)
    return job.frozen, job.batches.next


def _own_rows(parts: list[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """Those of this process: its file's, or of all files where it is alone."""
    several = jax.process_count() > 1 and len(parts) == jax.process_count()
    mine = parts[jax.process_index()] if several else {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
    if len(mine["labels"]) != count:
        raise ValueError(
            f"--batch has {len(mine['labels'])} rows of a step, not {count}: give the file of each process."
        )
    return mine


def describe(comparison: Comparison) -> str:
    """One line, or one for each difference."""
    if not comparison.different:
        bits = "  ".join(f"{n} {_bits(comparison.compared[n][1])}" for n in FINGERPRINT if n in comparison.compared)
        return f"step {comparison.step}: identical  {bits}"
    lines = [f"step {comparison.step}: different"]
    for name in comparison.different:
        recorded, now = comparison.compared[name]
        lines.append(f"  {name}: recorded {_bits(recorded)}, now {_bits(now)}")
    return "\n".join(lines)


FINGERPRINT = ("batch_checksum", "loss", "grad_norm", "param_norm", "parameters sha256")


def _bits(value: float | str | None) -> str:
    """An fp32 value with its bits in hex."""
    if value is None or isinstance(value, str):
        return "not finite" if value is None else value
    if value == round(value) >= 2**24 if math.isfinite(value) else False:
        return f"{int(value):08x}"  # a checksum
    return f"{value:.9g} ({np.float32(value).view(np.uint32):08x})"


def verdict(comparisons: Sequence[Comparison]) -> str:
    """What the comparisons say, in a sentence."""
    first = next((c for c in comparisons if c.different), None)
    if first is None:
        return "identical"
    if "batch_checksum" in first.different:
        return f"different from step {first.step} on: the batch is another one than then; look at the data."
    return (
        f"different from step {first.step} on, with the same batch: the hardware erred then or now, or the versions, "
        "the mesh or the machine are others. Replay on another machine of the kind tells which."
    )
