"""Runs stages in order, each by its own programs; a finished one is not repeated, an unfinished one resumes."""

from __future__ import annotations

import ctypes
import datetime
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from bc2_jax.demo.records import (
    Record,
    begin,
    fingerprint,
    is_complete,
    log_path,
    read_record,
    size_of,
    write_record,
)
from bc2_jax.demo.stage import Stage
from bc2_jax.files import lock

ROOT = Path(__file__).parents[2]
"""Where bc2_jax is imported from."""
_LAST_LINES = 20
_PATIENCE = 60.0
"""Seconds that a program has to save and end when it is told to."""
_POLL = 0.1
_SET_PARENT_DEATH_SIGNAL = 1


class StageFailed(RuntimeError):
    """A command of a stage failed; the message says which, shows the end of its log and how to continue."""


class Stopped(BaseException):
    """This program was told to stop by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Show(Protocol):
    """What is told how far the stages are."""

    def begin(self, stage: Stage, index: int) -> None: ...
    def working(self, log: Path) -> None: ...
    def end(self, stage: Stage, record: Record, was_done: bool) -> None: ...


def run_stages(stages: Sequence[Stage], workdir: Path, again: str, show: Show) -> dict[str, Record]:
    """The records of all stages after they have run in `workdir`, which is created; `again` is the command to continue.

    A stage is repeated if its settings or the stages that it needs have changed, or if an output is gone. Raises
    StageFailed if a command fails, Stopped at SIGINT and SIGTERM, after the running program has ended, InUse if another
    process works in `workdir`, and ValueError for files in it that are not ours.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    records: dict[str, Record] = {}
    with lock(workdir / ".lock", f"workdir = '{workdir}'"), _Signals():
        for index, stage in enumerate(stages):
            expected = fingerprint(stage, {name: records[name].finished for name in stage.needs})
            record = read_record(workdir, stage.name)
            was_done = is_complete(stage, record, workdir, expected)
            show.begin(stage, index)
            if record is None or not was_done:
                record = begin(stage, workdir, expected)
                _run(stage, record, workdir, f"stage {index + 1} of {len(stages)}, {stage.title}", again, show.working)
            records[stage.name] = record
            show.end(stage, record, was_done)
    return records


def _run(
    stage: Stage, record: Record, workdir: Path, where: str, again: str, working: Callable[[Path], None]
) -> None:  # fmt: skip
    """Runs the commands that the record does not have."""
    log = log_path(workdir, stage.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    for command in stage.commands[len(record.commands) :]:
        used, start = _cpu_seconds_of_children(), time.monotonic()
        code = _call(command, workdir, log, lambda: working(log))
        if code:
            _fail(where, command, code, log, again)
        used, seconds = _cpu_seconds_of_children() - used, time.monotonic() - start
        record.commands.append({"seconds": round(seconds, 2), "cpu_seconds": round(used, 2)})
        write_record(workdir, stage.name, record)
    missing = [output for output in stage.outputs if not (workdir / output).exists()]
    if missing:
        raise StageFailed(f"{where}, has ended without {missing[0]}; its log is {log}.")
    record.bytes = sum(size_of(workdir / output) for output in stage.outputs)
    record.finished = datetime.datetime.now(datetime.UTC).isoformat()
    write_record(workdir, stage.name, record)


def _call(command: Sequence[str], workdir: Path, log: Path, working: Callable[[], None]) -> int:
    """The exit code of a command whose output is added to the log."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends it.
        child = subprocess.Popen(
            words_to_run(command), cwd=workdir, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
        try:
            while child.poll() is None:
                working()
                time.sleep(_POLL)
        except BaseException:
            _end(child)
            raise
    return child.returncode


def words_to_run(command: Sequence[str]) -> list[str]:
    """The command for this interpreter: "bc2 SUBCOMMAND" by `python -m bc2_jax`, "python" by its path."""
    program, *rest = command
    return [sys.executable, *(["-m", "bc2_jax"] if program == "bc2" else []), *rest]


def end_with_parent() -> None:
    """On Linux a program ends, by SIGTERM, when this process is killed: the next start finds no other one at work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, at which programs save what they have; SIGKILL for it and its children if it takes too long."""
    child.terminate()
    try:
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _fail(where: str, command: Sequence[str], code: int, log: Path, again: str) -> NoReturn:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
    name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise StageFailed(
        f"{where}, failed with {name}.\n"
        f"command:   {shlex.join(command)}\n" + "".join(f"  | {line}\n" for line in lines) + f"whole log: {log}\n"
        f"continue:  {again}"
    )


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class _Signals:
    """Has SIGINT and SIGTERM raise Stopped in the main thread."""

    def __enter__(self) -> None:
        def stop(number: int, frame: object) -> None:
            raise Stopped(number)

        self._before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
