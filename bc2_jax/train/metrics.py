"""What every run reports: progress, throughput, metrics files, the parameters' fingerprint."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import jax
from jax.sharding import Mesh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bc2_jax.config import RunConfig
from bc2_jax.convert import stream
from bc2_jax.convert.table import flatten
from bc2_jax.files import replaced
from bc2_jax.model.baichuan import Params
from bc2_jax.sharding import to_host
from bc2_jax.terminal import make_console
from bc2_jax.tpu.chips import CHIPS, DEVICE_KINDS
from bc2_jax.train.expendable import Expendable
from bc2_jax.train.wandb_run import WandbRun

_log = logging.getLogger(__name__)


class Throughput:
    """tokens/s, model TFLOP/s and MFU, from the times at which steps were known to be complete."""

    def __init__(self, tokens_per_step: int, flops_per_step: int, flops_formula: str, mesh: Mesh):
        self.tokens, self.flops, self.flops_formula = tokens_per_step, flops_per_step, flops_formula
        chip = CHIPS.get(DEVICE_KINDS.get(mesh.devices.flat[0].device_kind, ""))
        self.peak = None if chip is None else chip.peak_flops / chip.devices * mesh.devices.size
        self.last = time.perf_counter()

    def formula(self) -> str:
        text = f"Model FLOPs per step: {self.flops_formula} = {self.flops:.3e} (recomputation not counted)"
        if self.peak is None:
            return f"{text}; MFU is not shown, the peak of this device is not known."
        return f"{text}; MFU = FLOPs / step time / {self.peak:.3e} peak FLOP/s."

    def restart(self) -> None:
        """Leaves out the time since the last step."""
        self.last = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Leaves out a part of the time since the last step: an evaluation, a save."""
        self.last += seconds

    def step(self) -> dict[str, float]:
        """Metrics of the step that has just completed."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        metrics = {"step_seconds": seconds, "tflops_per_second": self.flops / seconds / 1e12}
        if self.tokens:
            metrics["tokens_per_second"] = self.tokens / seconds
        if self.peak is not None:
            metrics["mfu"] = self.flops / seconds / self.peak
        return metrics


def memory_metrics() -> dict[str, float]:
    """GiB of device memory, current and peak, if the backend reports them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "hbm_gib", "peak_bytes_in_use": "hbm_peak_gib"}
    return {new: stats[old] / 2**30 for old, new in names.items() if old in stats}


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl, to TensorBoard events in WORKDIR/tensorboard and to W&B; only process 0 writes.

    Failed writes are counted and left out (`Expendable`).
    """

    def __init__(self, workdir: Path, start_step: int, expendable: Expendable, wandb: WandbRun | None = None):
        """Removes the lines of steps after `start_step`, from which the run resumes."""
        self.path, self._expendable = workdir / "metrics.jsonl", expendable
        self._file: BinaryIO | None = None
        self._is_torn = False
        """Whether the last line of the file is unfinished."""
        self._events, self._wandb = EventFiles(workdir / "tensorboard", start_step + 1), wandb
        self._is_writer = jax.process_index() == 0
        if self._is_writer and self.path.is_file():
            with expendable.attempt("metrics"):
                self._keep_until(start_step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of a step is recorded."""
        with self._expendable.attempt("metrics"):
            lines = read_metrics(self.path) if self.path.is_file() else []
            return any(name.startswith("validation_") for line in lines if line["step"] == step for name in line)
        return False

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends metrics of a step; several lines of one step add up."""
        if not self._is_writer:
            return
        # JSON has no NaN: values that are not finite are written as null.
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._expendable.attempt("metrics"):
            self._append((json.dumps({"step": step, **finite}) + "\n").encode())
        with self._expendable.attempt("tensorboard"):
            self._events.write(step, metrics)
        if self._wandb is not None:
            with self._expendable.attempt("wandb"):
                self._wandb.log(step, metrics)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        with self._expendable.attempt("tensorboard"):
            self._events.close()
        if self._wandb is not None:
            with self._expendable.attempt("wandb"):
                self._wandb.close()

    def _keep_until(self, step: int) -> None:
        lines, bad = _parse_metrics(self.path)
        if bad:
            damaged = self.path.with_name(f"{self.path.name}.damaged")
            shutil.copyfile(self.path, damaged)
            _log.warning("%s is kept as %s, with the lines that are not records of metrics.", self.path, damaged.name)
        kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
        with replaced(self.path) as partial:  # a kill here must not lose the metrics
            partial.write_text(kept, encoding="utf-8")

    def _append(self, line: bytes) -> None:
        """Unbuffered, so that nothing is written later; starts a new line after one that a full disk cut off."""
        if self._file is None:
            self._file = self.path.open("a+b", buffering=0)
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(size - 1, 0))
            self._is_torn = size > 0 and self._file.read(1) != b"\n"
        rest = b"\n" * self._is_torn + line
        while rest:
            count = self._file.write(rest)
            self._is_torn, rest = count < len(rest), rest[count:]


def make_writer(config: RunConfig, workdir: Path, start_step: int, expendable: Expendable) -> MetricsWriter:
    """The metrics writer of a run; with W&B if its config asks for it."""
    wandb = WandbRun(config, workdir) if config.wandb_project else None
    return MetricsWriter(workdir, start_step, expendable, wandb)


class EventFiles:
    """TensorBoard events in a folder, written in the caller's thread.

    A writer thread that ended at a full disk would make the run wait forever. After an error the next event starts a
    new file.
    """

    def __init__(self, folder: Path, purge_step: int):
        """TensorBoard ignores events of earlier files from `purge_step` on."""
        self._folder, self._purge_step = folder.absolute(), purge_step
        self._writer: Any = None
        self._flushed, self._files = 0.0, 0

    def write(self, step: int, metrics: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._open()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        try:
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            if time.monotonic() - self._flushed > 30:
                self._writer.flush()
                self._flushed = time.monotonic()
        except OSError:
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                writer.close()
            raise

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(parents=True, exist_ok=True)
        self._files += 1
        # Names have a resolution of one second: a restart within it would overwrite the previous file.
        writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{self._purge_step}.{self._files}")
        writer.write_event(
            Event(wall_time=time.time(), step=self._purge_step, session_log=SessionLog(status=SessionLog.START))
        )
        self._writer = writer


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics of each step in a metrics.jsonl, in order; of repeated values the last counts.

    Ignores an unfinished last line, and other malformed lines with a warning.
    """
    lines, bad = _parse_metrics(path)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        _log.warning("%s: line %d%s: not a record of metrics, ignored.", path, bad[0], more)
    return lines


def _parse_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Metrics by step, and the numbers, from 1, of malformed lines."""
    if not path.is_file():  # a device or a pipe may be endless
        raise FileNotFoundError(f"{path} is not a file.")
    steps: dict[int, dict[str, Any]] = {}
    bad = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int):
                raise ValueError
            steps[line["step"]] = steps.get(line["step"], {}) | line
        except (ValueError, KeyError, TypeError, RecursionError):
            bad.append(number)
    return [steps[step] for step in sorted(steps)], bad


class ProgressDisplay:
    """A progress bar on a terminal, else a log line every `log_every` steps; only process 0 prints."""

    def __init__(self, config: RunConfig, expendable: Expendable):
        self.config, self.start_step, self.start_time = config, 0, time.perf_counter()
        self._expendable = expendable
        self.console = make_console(quiet=jax.process_index() != 0)
        self._bar: Progress | None = None

    def start(self, step: int) -> None:
        """Starts the display after `step`; the remaining time is estimated from here on."""
        self.start_step, self.start_time = step, time.perf_counter()
        if self.console.is_terminal and jax.process_index() == 0:
            columns = (TextColumn("{task.fields[text]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("train", total=self.config.num_steps, completed=step, text="compiled")
            self._bar.start()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        text = f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.3f}  " if "reward" in metrics else ""
        text += f"loss {metrics['loss']:.4f}  "
        if "tokens_per_second" in metrics:
            text += f"{metrics['tokens_per_second']:,.0f} tokens/s"
        else:
            text += f"{metrics['step_seconds']:.2f} s a step"
        if "mfu" in metrics:
            text += f"  MFU {metrics['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self.config.log_every == 0 or step in (self.start_step + 1, self.config.num_steps):
            elapsed = time.perf_counter() - self.start_time
            left = round(elapsed / (step - self.start_step) * (self.config.num_steps - step))
            gradient = f"grad norm {metrics['grad_norm']:.3f}"
            self.say(f"step {step}/{self.config.num_steps}  {text}  {gradient}  {left // 60}:{left % 60:02} left")

    def say(self, text: str) -> None:
        if jax.process_index() == 0:
            with self._expendable.attempt("lines of the log"):
                self.console.print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def fingerprint(params: Params) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter; independent of the mesh.

    tools/convert.py prints the same for these parameters in any format.
    """
    digests = []
    for path, array in flatten(params).items():
        value = to_host(array)
        layers = range(len(value)) if path.startswith("layers.") else (None,)
        digests += [stream.digest_part((path, i), value if i is None else value[i]) for i in layers]
    return stream.fingerprint(digests)
