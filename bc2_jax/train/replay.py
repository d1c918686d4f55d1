"""Replays recorded steps from a checkpoint and compares them bit for bit: hardware error or changed data?

JSON keeps the numbers of metrics.jsonl exactly (Python writes the shortest text that parses to the same number), so
each line is a fingerprint of its step: of the batch on the devices, the loss, the gradients, the new parameters.
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
from bc2_jax.train.resume import restore_state
from bc2_jax.train.start import check_attention, tuned_options
from bc2_jax.validation import require


class Comparison(NamedTuple):
    """A recorded step and its replay."""

    step: int
    compared: dict[str, tuple[float | str | None, float | str]]
    """Name -> (recorded, replayed); a recorded None was not finite."""

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
    """Reads a checkpoint; unlike Checkpointer it changes nothing in the folder of a run."""

    path: Path

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
        verify(self.path)
        return load_state(self.path, params, opt_state)


def choose_checkpoint(path: str | Path, step: int) -> Path:
    """The newest complete checkpoint of a run before `step`, or the checkpoint at `path` itself."""
    path = Path(path).absolute()
    folder = path / "checkpoints"
    if folder.is_dir():
        earlier = [p for p in folder.iterdir() if p.name.isdigit() and int(p.name) < step and is_complete(p)]
        if not earlier:
            raise ValueError(f"--step = {step} is not valid: {path} has no checkpoint before it.")
        return max(earlier, key=lambda p: int(p.name))
    found = newest_checkpoint(path) or find_model(path).path  # raises with what is there instead
    if not found.name.isdigit() or int(found.name) >= step or not (found / "opt_state").is_dir():
        raise ValueError(f"--step = {step} is not valid: {found} must be a training checkpoint of a step before it.")
    return found


def recorded_config(checkpoint: Path, step: int, last: RunConfig) -> RunConfig:
    """The config that `step` was trained with; a run may resume from `checkpoint` with a changed one.

    It is in the next checkpoint; without one it is `last`, the config of the last start.
    """
    later = [p for p in checkpoint.parent.iterdir() if p.name.isdigit() and int(p.name) >= step and is_complete(p)]
    if not later:
        return last
    return read_config(read_metadata(min(later, key=lambda p: int(p.name)))["config"])


def _on_these_devices(config: RunConfig) -> RunConfig:
    """Simulated devices of several processes become those of one; on a pod the processes find each other."""
    devices = config.mesh.num_cpu_devices * (config.distributed.num_processes or 1)
    mesh = dataclasses.replace(config.mesh, num_cpu_devices=devices)
    return dataclasses.replace(config, distributed=DistributedConfig(), mesh=mesh)


def load_batch(paths: Sequence[str | Path], step: int) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """(rows of each file, metrics) that a run saved of a step. Raises ValueError for other files."""
    parts = []
    for path in paths:
        with np.load(path, allow_pickle=False) as file:  # data: nothing in it is executed
            parts.append(dict(file))
        missing = sorted({*FIELDS, "step"} - set(parts[-1]))
        if missing or int(parts[-1]["step"]) != step:
            reason = f"it has no {missing[0]}" if missing else f"it is of step {int(parts[-1]['step'])}, not {step}"
            raise ValueError(f"--batch = {str(path)!r} is not valid: {reason}.")
    metrics = {name.removeprefix("metric_"): float(x) for name, x in parts[0].items() if name.startswith("metric_")}
    # Fields of other shapes are numbers of the step.
    return [{name: x for name, x in part.items() if x.ndim == 2} for part in parts], metrics


def replay(path: str | Path, step: int, batch: Sequence[str | Path] = ()) -> Iterator[Comparison]:
    """Repeats the steps from the newest checkpoint before `step` to `step`; yields each compared with its record.

    Rows are read by the loader, those of `step` itself from the files `batch` if given. If a checkpoint of `step`
    exists, the parameters' SHA-256 is compared too. Writes nothing. Raises ValueError or FileNotFoundError, before any
    step, without the checkpoint, the records or as many devices as the run had.
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
    config = dataclasses.replace(config, workdir=str(run))  # the run may have been moved with its files
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
            legal = f"a {type(config).__name__} samples its batches and reads none: leave it out"
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
"""(step, state before it) -> the run's batch."""


def _reader(
    config: TrainConfig, mesh: Mesh, parts: StepParts, records: dict[int, dict[str, Any]],
    saved: tuple[list[dict[str, np.ndarray]], dict[str, float]] | None, last: int,
) -> NextBatch:  # fmt: skip
    """For a run on rows: reads the recorded rows; for step `last` the saved ones if given."""
    part, put = batch_part(mesh, jax.process_index()), make_put(config.data, mesh)
    make_loader = functools.cache(
        functools.partial(
            make_train_loader, config.data, process_index=part.process_index, process_count=part.process_count
        )
    )
    size = config.data.global_batch_size

    def next_batch(now: int, state: TrainState) -> Batch:
        # Earlier versions recorded the batch's number if it differed from the step's.
        first = int(records[now].get("first_row", records[now].get("data_index", now - 1) * size))
        rows = make_loader(first_row=first % size)[first // size]
        rows = rows | parts.fields(rows)
        if saved is not None and now == last:
            rows = _own_rows(saved[0], len(rows["labels"]))
        return parts.complete(now, put(rows))

    return next_batch


def _maker(config: RunConfig, mesh: Mesh, checkpoint: Path, scratch: Path) -> tuple[Params, NextBatch]:
    """(frozen parameters, batches) of a run that samples its batches; it writes to `scratch` instead of the workdir."""
    step = int(checkpoint.name)
    metadata = read_training_metadata(checkpoint)
    console = make_console(quiet=True)
    start = Start(mesh, scratch, step, metadata, console, console.print, "", Expendable())
    job = kind_of(config).make_job(config, start)
    job.batches.seek(metadata.data)
    return job.frozen, job.batches.next


def _own_rows(parts: list[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """The rows of this process: from its file, or from all files if it is the only process."""
    several = jax.process_count() > 1 and len(parts) == jax.process_count()
    mine = parts[jax.process_index()] if several else {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
    if len(mine["labels"]) != count:
        raise ValueError(f"--batch has {len(mine['labels'])} rows, not {count}: pass the file of each process.")
    return mine


def describe(comparison: Comparison) -> str:
    """One line if all is identical, else one line per difference."""
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
    """The conclusion from the comparisons, in a sentence."""
    first = next((c for c in comparisons if c.different), None)
    if first is None:
        return "identical"
    if "batch_checksum" in first.different:
        return f"different from step {first.step} on: the batch differs; look at the data."
    return (
        f"different from step {first.step} on, with the same batch: a hardware error then or now, or other versions, "
        "another mesh or another kind of machine. A replay on another machine of the same kind tells which."
    )
