"""Starts, signals, kills and restarts the processes of a training run on this machine, and reads what they leave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bc2_jax.train.metrics import read_metrics

WORKER = Path(__file__).with_name("worker.py")

CONFIG = '''"""A run of seconds."""

from bc2_jax.config import *


def config() -> TrainConfig:
    return TrainConfig(
        name="tiny",
        model=ModelConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            position_embedding="alibi", vocab_size=640,
        ),
        data=DataConfig(
            sources=(SourceConfig(path={rows!r}),), tokenizer={tokenizer!r}, sequence_length=32, global_batch_size=12,
        ),
        compute=ComputeConfig(attention_block=16, loss_chunk=32, dtype="float32"),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2, decay_steps=40),
        checkpoint=CheckpointConfig(save_every=1000, keep_last=9),
        num_steps=30, eval_every=1000, eval_batches=1, log_every=1,
    )
'''


def write_config(folder: Path, rows: Path, tokenizer: Path) -> Path:
    """The config file of a tiny run on these packed rows."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(rows=str(rows), tokenizer=str(tokenizer)))
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Returns when `condition` holds; raises TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s.")
        time.sleep(0.02)


@dataclasses.dataclass
class Job:
    """The processes of one start of a run."""

    workdir: Path
    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, seconds: float = 180) -> list[int]:
        """Exit codes, negative signals; kills what has not ended after `seconds` and raises TimeoutError."""
        try:
            wait_until(lambda: all(p.poll() is not None for p in self.processes), self.text(), seconds)
        finally:
            self.kill()
        return [process.returncode for process in self.processes]

    def send(self, number: signal.Signals, process: int) -> None:
        self.processes[process].send_signal(number)

    def kill(self) -> None:
        """SIGKILL to every process that is still there."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def log(self, process: int) -> str:
        return self.logs[process].read_text(errors="replace")

    def text(self) -> str:
        """The ends of all logs, for messages."""
        return "\n".join(f"--- process {i}\n{self.log(i)[-3000:]}" for i in range(len(self.logs)))

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Returns when the metrics of `step` are written; raises TimeoutError, or RuntimeError if a process ends."""

        def there() -> bool:
            if any(process.poll() is not None for process in self.processes):
                raise RuntimeError(f"A process ended before step {step}.\n{self.text()}")
            return max(steps(self.workdir), default=-1) >= step

        wait_until(there, f"step {step}\n{self.text()}", seconds)


def launch(
    config: Path, workdir: Path, *args: str, processes: int = 1, devices: int = 1, step_seconds: float = 0
) -> Job:
    """Starts a run, or goes on with it, as `processes` processes with `devices` CPU devices each.

    Logs are WORKDIR.START.PROCESS.log, the rows each process read WORKDIR.START.PROCESS.rows. `args` are more arguments
    of train.py.
    """
    port, start = free_port(), len(list(workdir.parent.glob(f"{workdir.name}.*.0.log")))
    popens, logs = [], []
    for process in range(processes):
        command = [sys.executable, str(WORKER), str(config), f"--workdir={workdir}", "--resume=auto"]
        command += [f"--mesh.num-cpu-devices={devices}", *args]
        if processes > 1:
            command += [f"--distributed.coordinator-address=127.0.0.1:{port}", f"--distributed.process-id={process}"]
            command += [f"--distributed.num-processes={processes}"]
        logs.append(workdir.parent / f"{workdir.name}.{start}.{process}.log")
        environment = os.environ | {
            "RECORDED_ROWS": str(logs[-1].with_suffix(".rows")), "STEP_SECONDS": str(step_seconds),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # On a CPU JAX keeps the programs of process 0 alone: the others compile at every start.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        }  # fmt: skip
        with logs[-1].open("w") as log:
            popens.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    return Job(workdir, popens, logs)


def steps(workdir: Path) -> list[int]:
    """Steps whose metrics are written."""
    path = workdir / "metrics.jsonl"
    return [m["step"] for m in read_metrics(path)] if path.exists() else []


def losses(workdir: Path) -> dict[int, float]:
    return {m["step"]: m["loss"] for m in read_metrics(workdir / "metrics.jsonl") if "loss" in m}


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdecimal())


def hash_row(row: np.ndarray) -> str:
    """Of input_ids, int32 [T]: by what `rows_read` names a row."""
    return hashlib.sha1(row.tobytes()).hexdigest()[:12]


def rows_read(workdir: Path) -> dict[int, list[str]]:
    """Hashes of the rows of each step, sorted, all processes together; as the last start that reached it read them."""
    read: dict[int, dict[int, set[tuple[str, ...]]]] = {}
    for path in workdir.parent.glob(f"{workdir.name}.*.rows"):
        start = int(path.name.split(".")[-3])
        for line in path.read_text().splitlines():
            step, hashes = json.loads(line)
            # Processes that cut the same sequences read the same rows.
            read.setdefault(step, {}).setdefault(start, set()).add(tuple(hashes))
    return {step: sorted(h for part in starts[max(starts)] for h in part) for step, starts in sorted(read.items())}


def fingerprint(job: Job) -> str:
    """SHA-256 of the parameters, as a finished run prints it."""
    return job.log(0).rsplit("parameters sha256 ", 1)[1].split()[0]
