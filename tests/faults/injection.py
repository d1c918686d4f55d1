"""Fault injection: signals and damage at chosen phases of a run, and checks that the run handles them as promised."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import re
import runpy
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bc2_jax.checkpoint import Checkpointer
from bc2_jax.sharding import make_mesh
from bc2_jax.train.distributed import EXIT_HUNG, EXIT_LOST, EXIT_PREEMPTED
from bc2_jax.train.optimizer import make_optimizer
from bc2_jax.train.pretrain import make_abstract_state
from bc2_jax.train.resume import restore_state
from tests.faults import harness

KINDS = ("kill", "kill all", "terminate", "stop")
DAMAGES = ("flip", "truncate", "delete")
# Codes that a supervisor restarts, and 0. JAX ends a process that has lost the others with SIGABRT.
GOOD_CODES = {0, EXIT_HUNG, EXIT_PREEMPTED, EXIT_LOST, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGTERM}
# A fault does not wait for its phase beyond this many steps.
PATIENCE = 20
MOST_UNPROVOKED = 5


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something done to a running process."""

    kind: str
    """Of KINDS. A stopped process continues when the others have ended."""
    victim: int
    phase: str
    """Of harness.PHASES, of the victim; only process 0 seals and renames."""
    step: int = 0
    """The first step that counts, if the phase belongs to a step."""
    delay: float = 0
    """Seconds from the beginning of the phase."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """Damage to the newest good checkpoint between two starts."""

    kind: str
    """Of DAMAGES: a flipped bit, a truncated file, a removed file."""
    where: int
    """Seed of the choice of file and position."""


class Start(NamedTuple):
    """The next start of a run and its faults."""

    processes: int
    devices: int
    """Of each process."""
    args: tuple[str, ...] = ()
    fault: Fault | None = None
    damages: tuple[Damage, ...] = ()
    """The last good checkpoint is never damaged."""


@dataclasses.dataclass
class Event:
    """A fault that was injected."""

    kind: str
    phase: str
    """The victim's phase; for damage, "between starts"."""
    processes: int
    step: int
    """The last batch that process 0 had read."""
    is_survived: bool = False
    """A later start resumed from the newest good checkpoint."""
    is_detected: bool | None = None
    """Damage: named in the log. A process killed or stopped: the others ended by themselves. SIGTERM: exit code 75."""


@dataclasses.dataclass
class Record:
    """A run under faults."""

    events: list[Event] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    """Broken promises."""
    exit_codes: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    starts: int = 0
    unprovoked: int = 0
    """Starts that failed before their fault came: the machine was too slow for the timeouts."""
    steps_again: int = 0
    """Steps trained more than once, from their metrics."""
    last: harness.Job | None = None
    """The start that finished the run."""

    @property
    def kills(self) -> int:
        return sum(event.kind.startswith("kill") for event in self.events)


def run(
    config: Path, workdir: Path, args: tuple[str, ...], next_start: Callable[[Record, list[int]], Start],
    step_seconds: float = 0, timeout: float = 120,
) -> Record:  # fmt: skip
    """Restarts a run as `next_start` says until a start without a fault finishes it.

    `next_start` is given what happened so far and the steps of the good checkpoints. `timeout` is for what must happen
    by itself, in seconds.
    """
    record = Record()
    directory = workdir / "checkpoints"
    damaged: dict[int, Event] = {}  # by the folder's inode: it stays the same when the folder is set aside
    expected = 0
    while True:
        inodes = {step: (directory / str(step)).stat().st_ino for step in harness.checkpoints(workdir)}
        good = [step for step, inode in inodes.items() if inode not in damaged]
        problem = functools.partial(_problem, record)
        if max(good, default=0) < expected:
            problem(f"the good checkpoint of step {expected} is gone")
        start = next_start(record, good)
        for damage in start.damages[: max(0, len(good) - 1)]:
            step = good.pop()
            inflict(damage, directory / str(step))
            record.events.append(Event(damage.kind, "between starts", start.processes, step, is_detected=False))
            damaged[inodes[step]] = record.events[-1]
        expected, before = max(good, default=0), max(harness.steps(workdir), default=0)
        earlier = list(record.events)
        job = harness.launch(
            config, workdir, *args, *start.args,
            processes=start.processes, devices=start.devices, step_seconds=step_seconds,
        )  # fmt: skip
        event = None
        try:
            event = inject(job, start.fault, timeout) if start.fault else None
            codes = job.wait(timeout)
        except TimeoutError as error:
            problem(f"{start.fault} and it did not end by itself: {error}")
        finally:
            job.kill()
        codes = [process.returncode for process in job.processes]
        record.exit_codes.update(codes)
        record.unprovoked += event is None and any(codes)
        if not set(codes) <= GOOD_CODES:
            problem(f"{start.fault}, exit codes {codes}\n{job.text()}")
        if start.fault and event:
            record.events.append(event)
            _judge(event, start.fault, codes)
            if not any(codes) and job.last_read() > max(event.step, expected) + 4:
                problem(f"{start.fault} was not noticed")
        for step in set(inodes) - set(good):
            named = re.escape(str(directory / str(step)))
            pattern = rf"{named}[/ ].*It is not used; the newest good checkpoint is that of step {expected}\."
            if re.search(pattern, job.log(0)):
                damaged[inodes[step]].is_detected = True
        resumed = [int(step) for step in re.findall(r"Resumed at step (\d+)", job.log(0))]
        if resumed and resumed[0] != expected:
            problem(f"it went on from {resumed[0]}, not from {expected}")
        if resumed or (expected == 0 and job.has_begun(0, "compile")):
            record.steps_again += max(0, before - expected)
            for survived in earlier:
                survived.is_survived = True
        record.starts += 1
        if event is None and (not any(codes) or record.unprovoked > MOST_UNPROVOKED):
            record.last = job
            return record


def _problem(record: Record, text: str) -> None:
    record.problems.append(f"start {record.starts}: {text}")


def inject(job: harness.Job, fault: Fault, timeout: float) -> Event | None:
    """Waits for the fault's moment and injects it; None if a process ended before.

    A stopped process continues when the others have ended. Raises TimeoutError after `timeout` seconds.
    """
    watched = 0 if fault.phase in ("seal", "rename") else fault.victim

    def is_time() -> bool:
        late = job.has_begun(watched, "step", fault.step + PATIENCE)
        return late or job.has_begun(watched, fault.phase, fault.step) or _has_ended(job)

    harness.wait_until(is_time, f"{fault}", timeout, every=0.003)
    time.sleep(fault.delay)
    if _has_ended(job):
        return None
    victims = range(len(job.processes)) if fault.kind == "kill all" else [fault.victim]
    number = {"terminate": signal.SIGTERM, "stop": signal.SIGSTOP}.get(fault.kind, signal.SIGKILL)
    for victim in victims:
        job.send(number, victim)
    if number == signal.SIGKILL:
        job.processes[victims[0]].wait()
    event = Event(fault.kind, job.phase(watched), len(job.processes), job.last_read())
    if fault.kind == "stop":
        others = [process for i, process in enumerate(job.processes) if i != fault.victim]
        harness.wait_until(lambda: all(other.poll() is not None for other in others), "the others", timeout)
        job.send(signal.SIGCONT, fault.victim)
    return event


def _has_ended(job: harness.Job) -> bool:
    return any(process.poll() is not None for process in job.processes)


def _judge(event: Event, fault: Fault, codes: list[int]) -> None:
    others = [code for i, code in enumerate(codes) if i != fault.victim]
    if fault.kind == "terminate":
        event.is_detected = set(codes) == {EXIT_PREEMPTED} if any(codes) else None  # it was at its end
    elif fault.kind != "kill all" and others:
        # -SIGKILL would be ours, after the timeout.
        event.is_detected = set(others) <= GOOD_CODES - {-signal.SIGKILL}


def inflict(damage: Damage, folder: Path) -> None:
    """Damages one file of a checkpoint."""
    rng = random.Random(damage.where)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    file = rng.choice(files)
    if damage.kind == "delete":
        return file.unlink()
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if damage.kind == "truncate":
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def differences(config: Path, last_step: int, job: harness.Job, whole: harness.Job, rtol: float = 0) -> list[str]:
    """Differences between the finished `job` and `whole`, the uninterrupted run.

    Rows must be the same in any case. With `rtol` losses may differ by so much, and the final states are not compared.
    """
    found = []
    rows, expected = harness.rows_read(job.workdir), harness.rows_read(whole.workdir)
    if lost := _count(expected, rows):
        found.append(f"{lost} rows are lost")
    if again := _count(rows, expected):
        found.append(f"{again} rows are repeated or of another step")
    losses, reference = harness.losses(job.workdir), harness.losses(whole.workdir)
    if set(losses) != set(reference):
        found.append(f"losses are not of the same steps: {sorted(set(losses) ^ set(reference))}")
    far = [s for s in set(losses) & set(reference) if abs(losses[s] - reference[s]) > rtol * abs(reference[s])]
    if far:
        found.append(f"losses differ at steps {sorted(far)}")
    if rtol:
        return found
    if harness.fingerprint(job) != harness.fingerprint(whole):
        found.append("fingerprints of the parameters differ")
    states = [_state(config, one.workdir, last_step) for one in (job, whole)]
    for (path, mine), theirs in zip(jax.tree.flatten_with_path(states[0])[0], jax.tree.leaves(states[1]), strict=True):
        if np.asarray(mine).tobytes() != np.asarray(theirs).tobytes():
            found.append(f"{jax.tree_util.keystr(path)} of the last checkpoint differs")
    return found


def _count(rows: dict[int, list[str]], others: dict[int, list[str]]) -> int:
    """Number of rows that are not in the same step of `others`."""
    counted = (collections.Counter(hashes) - collections.Counter(others.get(step, ())) for step, hashes in rows.items())
    return sum(difference.total() for difference in counted)


def _state(config: Path, workdir: Path, step: int) -> Any:
    """Parameters and optimizer state of a checkpoint, on one device."""
    resolved = runpy.run_path(str(config))["config"]().resolve(1)
    checkpointer = Checkpointer(workdir / "checkpoints", resolved.checkpoint)
    mesh = make_mesh(resolved.mesh, jax.local_devices()[:1])
    try:
        return restore_state(
            checkpointer, step, make_abstract_state(resolved, mesh, make_optimizer(resolved.optimizer))
        )
    finally:
        checkpointer.close()
