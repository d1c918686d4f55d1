"""What is known of the stages of a workdir: a JSON file for each, written before and after every command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bc2_jax.demo.stage import Stage
from bc2_jax.files import replaced

RECORDS, LOGS = "stages", "logs"


@dataclasses.dataclass
class Record:
    """A stage that was started."""

    fingerprint: str
    """Of its commands and of the stages that it needs: another one means that it must be repeated."""
    commands: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of each finished command: seconds, cpu_seconds (of the process and its children)."""
    interruptions: int = 0
    """How often it was started again after it had been stopped, killed or had failed."""
    finished: str = ""
    """When it was complete, "" if it is not."""
    bytes: int = 0
    """Of its outputs."""

    @property
    def seconds(self) -> float:
        """Of the commands that were finished; time before an interruption is not counted."""
        return sum(command["seconds"] for command in self.commands)

    @property
    def cpu_seconds(self) -> float:
        return sum(command["cpu_seconds"] for command in self.commands)


def record_path(workdir: Path, name: str) -> Path:
    return workdir / RECORDS / f"{name}.json"


def log_path(workdir: Path, name: str) -> Path:
    return workdir / LOGS / f"{name}.log"


def read_record(workdir: Path, name: str) -> Record | None:
    """None if the stage was never started. Raises ValueError if the file is not a record."""
    path = record_path(workdir, name)
    if not path.is_file():
        return None
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a stage ({error}): remove it to repeat the stage.") from error


def write_record(workdir: Path, name: str, record: Record) -> None:
    path = record_path(workdir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")


def fingerprint(stage: Stage, needed: Mapping[str, str]) -> str:
    """SHA-256 of the commands of a stage and of when each stage that it needs was finished (`needed`, by name)."""
    about = [stage.commands, [needed[name] for name in stage.needs]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def is_complete(stage: Stage, record: Record | None, workdir: Path, expected: str) -> bool:
    """Whether the stage was finished with the fingerprint `expected`, and its outputs exist."""
    if record is None or not record.finished or record.fingerprint != expected:
        return False
    return all((workdir / output).exists() for output in stage.outputs)


def begin(stage: Stage, workdir: Path, expected: str) -> Record:
    """The record of a stage that starts or resumes, written to disk.

    Outputs of the stage with other settings are removed. Raises ValueError for outputs that it has not made.
    """
    record = read_record(workdir, stage.name)
    outputs = [path for output in stage.outputs if (path := workdir / output).exists()]
    if record is None and outputs:
        raise ValueError(f"{outputs[0]} exists and was not made by this program: name another --workdir, or move it.")
    is_same = record is not None and record.fingerprint == expected and not record.finished
    if record is not None and is_same:
        record.interruptions += 1
    else:
        # The record goes first: whenever this is killed, what is left has the record of an unfinished stage.
        record = Record(expected)
        write_record(workdir, stage.name, Record("being removed"))
        for path in outputs:
            remove(path)
        log_path(workdir, stage.name).unlink(missing_ok=True)
    write_record(workdir, stage.name, record)
    return record


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
