"""What a stage is, as data: the programs it runs, what they make, and what the report shows of it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; columns after the first are aligned at the right."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    path: str
    """Of a PNG file, relative to the workdir."""
    caption: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished stage came to."""

    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Title -> text as it is: an answer, a sample."""
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """For programs: JSON-able numbers by name."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Programs that run one after the other in the workdir, each of which resumes if it is started again."""

    name: str
    """Also of its record and its log."""
    title: str
    about: str
    """What is done and why, in a sentence or two."""
    commands: tuple[tuple[str, ...], ...]
    """Words of each command. The first is "bc2", for one of our subcommands, or "python"."""
    outputs: tuple[str, ...]
    """Files and folders that it makes, relative to the workdir: removed before it is repeated with other settings."""
    read: Callable[[Path], Result]
    """From the workdir, after the commands."""
    needs: tuple[str, ...] = ()
    """Names of stages whose outputs it reads: it is repeated after they are."""
    typed: tuple[str, ...] = ()
    """What a user would type instead, where that differs from the commands."""
    seconds: float = 60.0
    """About how long it takes on two cores; for the time left."""


def typed_commands(stage: Stage) -> list[str]:
    """The commands of the stage as a user would type them in the workdir."""
    return list(stage.typed) or [shlex.join(command) for command in stage.commands]


def stages_for(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages with these names and all that they need, in the order of `stages`; without names all of them.

    Raises ValueError for an unknown name.
    """
    by_name = {stage.name: stage for stage in stages}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"there is no stage {unknown[0]!r}; legal names are {', '.join(by_name)}.")
    wanted = list(names or by_name)
    for name in wanted:  # grows while it is read
        wanted += [need for need in by_name[name].needs if need not in wanted]
    return [stage for stage in stages if stage.name in wanted]
