"""What every run tells: progress, throughput, metrics files, the parameters' fingerprint."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bc2_jax.config import RunConfig
from bc2_jax.convert import stream
from bc2_jax.convert.table import flatten
from bc2_jax.model.baichuan import Params
from bc2_jax.sharding import to_host
from bc2_jax.tpu.chips import CHIPS, DEVICE_KINDS


class Throughput:
    """tokens/s, model TFLOP/s and MFU from the times at which steps were known to be complete."""

    def __init__(self, tokens_per_step: int, flops_per_step: int, mesh: Mesh):
        self.tokens, self.flops = tokens_per_step, flops_per_step
        chip = CHIPS.get(DEVICE_KINDS.get(mesh.devices.flat[0].device_kind, ""))
        self.peak = None if chip is None else chip.peak_flops / chip.devices * mesh.devices.size
        self.last = time.perf_counter()

    def formula(self) -> str:
        text = (
            f"Model FLOPs per step: 6 x matmul parameters x tokens + causal attention = {self.flops:.3e} "
            "(recomputation not counted)"
        )
        if self.peak is None:
            return f"{text}; MFU is not shown, the peak of this device is not known."
        return f"{text}; MFU = FLOPs / step time / {self.peak:.3e} peak FLOP/s."

    def restart(self) -> None:
        """Leaves out what happened since the last step: compilation, evaluation."""
        self.last = time.perf_counter()

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
    """GiB of device memory in use now and at the peak, where the backend reports them."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "hbm_gib", "peak_bytes_in_use": "hbm_peak_gib"}
    return {new: stats[old] / 2**30 for old, new in names.items() if old in stats}


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and to TensorBoard events in WORKDIR/tensorboard; only process 0 writes."""

    def __init__(self, workdir: Path, start_step: int):
        """Lines of steps after `start_step`, where the run is taken up again, are removed: they will come anew."""
        self.path = workdir / "metrics.jsonl"
        self._file = self._tensorboard = None
        if jax.process_index() != 0:
            return
        kept = [m for m in read_metrics(self.path) if m["step"] <= start_step] if self.path.exists() else []
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")
        partial.replace(self.path)  # killed here, the run still has its metrics
        from tensorboardX import SummaryWriter

        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        if self._file is None or self._tensorboard is None:
            return
        # JSON has no nan; a value that is none is written as null rather than as a line no parser reads.
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None and self._tensorboard is not None:
            self._file.close()
            self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut off by a killed run is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class ProgressDisplay:
    """A progress bar on a terminal, a log line every `log_every` steps elsewhere; only process 0 prints."""

    def __init__(self, config: RunConfig):
        self.config, self.start_step, self.start_time = config, 0, time.perf_counter()
        self.console = Console(quiet=jax.process_index() != 0, highlight=False)
        self._bar: Progress | None = None

    def start(self, step: int) -> None:
        """Steps after `step` follow; the time that is left is counted from here on."""
        self.start_step, self.start_time = step, time.perf_counter()
        if self.console.is_terminal and jax.process_index() == 0:
            columns = (TextColumn("{task.fields[text]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("train", total=self.config.num_steps, completed=step, text="compiled")
            self._bar.start()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        text = f"loss {metrics['loss']:.4f}  "
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
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def fingerprint(params: Params) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter; does not depend on the mesh.

    It is what tools/convert.py prints of the same parameters in any format.
    """
    digests = []
    for path, array in flatten(params).items():
        value = to_host(array)
        layers = range(len(value)) if path.startswith("layers.") else (None,)
        digests += [stream.digest_part((path, i), value if i is None else value[i]) for i in layers]
    return stream.fingerprint(digests)
