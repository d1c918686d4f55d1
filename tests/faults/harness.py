"""Starts, signals, kills and restarts the processes of a training run on this machine, and reads their output."""

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
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bc2_jax.train.metrics import read_metrics
from tests.compiler import QUICK_COMPILE
from tests.faults import preloaded

WORKER = Path(__file__).with_name("worker.py")

START_PHASES = ("start", "join", "verify", "restore", "compile")
SAVE_PHASES = ("save", "write", "seal", "rename")
"""save: arrays are copied; write: all processes; seal: hashes and syncs, process 0; rename: it removes old ones."""
PHASES = (*START_PHASES, "read", "step", *SAVE_PHASES, "end")
"""Phases of a process, in order: read and step alternate; a save runs in the background until `saved`."""

# Faults do not depend on the model. This one is traced and compiled fastest, by each of many processes: no loop over
# layers, no rematerialisation. With several processes the steps are slow: each has about 50 collectives.
STEPS = 20
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
        compute=ComputeConfig(
            attention="reference", remat="none", scan_layers=False, loss_chunk=32, dtype="float32",
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2, decay_steps=40),
        checkpoint=CheckpointConfig(save_every=1000, keep_last=9),
        num_steps={steps}, eval_every=1000, eval_batches=1, log_every=1,
    )
'''


def write_config(folder: Path, rows: Path, tokenizer: Path) -> Path:
    """The config file of a tiny run on these packed rows."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(rows=str(rows), tokenizer=str(tokenizer), steps=STEPS))
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120, every: float = 0.02) -> None:
    """Waits for `condition`, checked `every` seconds; raises TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s.")
        time.sleep(every)


@dataclasses.dataclass
class Job:
    """The processes of one start of a run."""

    workdir: Path
    processes: Sequence[subprocess.Popen | preloaded.Program]
    logs: list[Path]

    def wait(self, seconds: float = 180) -> list[int]:
        """Exit codes (a signal is negative); after `seconds`, kills the rest and raises TimeoutError."""
        try:
            wait_until(lambda: all(p.poll() is not None for p in self.processes), self.text(), seconds)
        finally:
            self.kill()
        return [process.returncode for process in self.processes]

    def send(self, number: signal.Signals, process: int) -> None:
        self.processes[process].send_signal(number)

    def kill(self) -> None:
        """SIGKILL to every running process."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def log(self, process: int) -> str:
        return self.logs[process].read_text(errors="replace")

    def phases(self, process: int) -> list[tuple[str, int]]:
        """(phase, step) of each phase that began; step 0 if it has none."""
        path = self.logs[process].with_suffix(".phases")
        lines = path.read_text().splitlines() if path.exists() else []
        return [(phase, int(step)) for phase, step in map(str.split, lines)]

    def has_begun(self, process: int, phase: str, step: int = 0) -> bool:
        """Whether a phase has begun, at `step` or later if it belongs to a step."""
        first = 0 if phase in (*START_PHASES, "end") else step
        return any(name == phase and at >= first for name, at in self.phases(process))

    def phase(self, process: int) -> str:
        """The phase of the process, or its last one; a running save takes precedence over other phases."""
        names = [name for name, _ in self.phases(process)]
        for i, name in reversed(list(enumerate(names))):
            if name in SAVE_PHASES and "saved" not in names[i:]:
                return name
        return next((name for name in reversed(names) if name in PHASES and name not in SAVE_PHASES), "start")

    def last_read(self) -> int:
        """The step of the last batch that process 0 has read, or 0."""
        return max((step for phase, step in self.phases(0) if phase == "step"), default=0)

    def text(self) -> str:
        """The ends of all logs, for messages."""
        return "\n".join(f"--- process {i}\n{self.log(i)[-3000:]}" for i in range(len(self.logs)))

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Waits until the metrics of `step` are written; raises TimeoutError, or RuntimeError if a process ends."""

        def there() -> bool:
            if any(process.poll() is not None for process in self.processes):
                raise RuntimeError(f"A process ended before step {step}.\n{self.text()}")
            return max(steps(self.workdir), default=-1) >= step

        wait_until(there, f"step {step}\n{self.text()}", seconds)


def launch(
    config: Path, workdir: Path, *args: str, processes: int = 1, devices: int = 1, step_seconds: float = 0,
    hold: dict[int, str] | None = None, own_args: dict[int, list[str]] | None = None,
) -> Job:  # fmt: skip
    """Starts or resumes a run as `processes` processes with `devices` CPU devices each.

    Logs are WORKDIR.START.PROCESS.log, the rows each process read WORKDIR.START.PROCESS.rows, its phases
    WORKDIR.START.PROCESS.phases. `args` are more arguments of train.py, `own_args` those of one process alone. `hold`
    maps a process to PHASE or PHASE:STEP, in which it waits to be killed.
    """
    port, start = free_port(), len(list(workdir.parent.glob(f"{workdir.name}.*.0.log")))
    popens: list[subprocess.Popen | preloaded.Program] = []
    logs: list[Path] = []
    for process in range(processes):
        command = [str(WORKER), str(config), f"--workdir={workdir}", "--resume=auto"]
        command += [f"--mesh.num-cpu-devices={devices}", *args, *(own_args or {}).get(process, [])]
        if processes > 1:
            command += [f"--distributed.coordinator-address=127.0.0.1:{port}", f"--distributed.process-id={process}"]
            command += [f"--distributed.num-processes={processes}"]
        logs.append(workdir.parent / f"{workdir.name}.{start}.{process}.log")
        environment = os.environ | {
            "RECORDED_ROWS": str(logs[-1].with_suffix(".rows")), "STEP_SECONDS": str(step_seconds),
            "RECORDED_PHASES": str(logs[-1].with_suffix(".phases")), "HOLD_AT": (hold or {}).get(process, ""),
            "XLA_FLAGS": QUICK_COMPILE,
        }  # fmt: skip
        if hold == {process: "start"} or "CLOCK_JUMPS" in environment:  # before anything is imported
            with logs[-1].open("w") as log:
                popens.append(
                    subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=environment)
                )
        else:
            logs[-1].touch()
            popens.append(preloaded.Program(command, environment, logs[-1]))
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
    """The name of a row in `rows_read`, from input_ids, int32 [T]."""
    return hashlib.sha1(row.tobytes()).hexdigest()[:12]


def rows_read(workdir: Path) -> dict[int, list[str]]:
    """Sorted hashes of the rows of each step over all processes, as read by the last start that reached it."""
    read: dict[int, dict[int, set[tuple[str, ...]]]] = {}
    for path in workdir.parent.glob(f"{workdir.name}.*.rows"):
        start = int(path.name.split(".")[-3])
        for line in path.read_text().splitlines():
            step, hashes = json.loads(line)
            # Processes that shard the same sequences read the same rows.
            read.setdefault(step, {}).setdefault(start, set()).add(tuple(hashes))
    return {step: sorted(h for part in starts[max(starts)] for h in part) for step, starts in sorted(read.items())}


def fingerprint(job: Job) -> str:
    """SHA-256 of the parameters, as printed by a finished run."""
    return job.log(0).rsplit("parameters sha256 ", 1)[1].split()[0]
