"""The checkpoints of a run as a table and as releases named by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax import manifest
from bc2_jax.convert.conversion import Options, Summary, to_hf
from bc2_jax.metadata import is_complete, read_training_metadata
from bc2_jax.train.metrics import read_metrics


class Milestone(NamedTuple):
    """One checkpoint of a run."""

    step: int
    path: Path
    tokens: int
    """Tokens trained on."""
    loss: float | None
    """Training cross entropy (nats per token), or the loss of the run's kind; None if metrics.jsonl lacks it."""
    validation_loss: float | None
    permanent: bool
    """Whether it is never deleted."""
    problem: str | None
    """What is wrong with its files; None if nothing is."""


def list_milestones(run: Path, hashes: bool = False) -> list[Milestone]:
    """The checkpoints of a run's folder, oldest first; with `hashes` all bytes are verified.

    Raises FileNotFoundError if there are none.
    """
    folders = sorted((p for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))
    if not folders:
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no checkpoints/STEP.")
    file = run / "metrics.jsonl"
    metrics = {line.get("step"): line for line in read_metrics(file)} if file.is_file() else {}
    return [_read(folder, metrics.get(int(folder.name), {}), hashes) for folder in folders]


def _read(folder: Path, metrics: dict[str, Any], hashes: bool) -> Milestone:
    step, tokens, permanent, problem = int(folder.name), 0, False, None
    try:
        if not is_complete(folder):
            raise manifest.DamagedCheckpoint(f"{folder} is not complete.")
        manifest.verify(folder, hashes=hashes)
    except (manifest.DamagedCheckpoint, OSError) as error:
        problem = str(error)
    try:
        metadata = read_training_metadata(folder)
        tokens, permanent = metadata.tokens, metadata.permanent
    except (OSError, ValueError) as error:
        problem = problem or f"{folder} is damaged: its metadata cannot be read ({error})."
    loss, validation = (metrics.get(f"{p}cross_entropy", metrics.get(f"{p}loss")) for p in ("", "validation_"))
    return Milestone(step, folder, tokens, loss, validation, permanent, problem)


def revision_name(tokens: int) -> str:
    """Name of a release after `tokens` tokens: train_00220B after 220 billion.

    Runs too short for billions are named in millions (M) or thousands (K).
    """
    size, unit = next(
        (size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if tokens >= size or size == 1e3
    )
    return f"train_{round(tokens / size):05d}{unit}"


def export(run: Path, steps: list[int] | None, folder: Path) -> Iterator[Summary]:
    """Writes checkpoints in the released format to FOLDER/train_00220B, ...: bf16, one pytorch_model.bin.

    `steps` = None exports every permanent checkpoint. Raises ValueError for a missing or damaged one before anything is
    written, and FileExistsError for an existing revision.
    """
    milestones = list_milestones(run)
    found = {milestone.step: milestone for milestone in milestones}
    if steps is None:
        steps = [milestone.step for milestone in milestones if milestone.permanent]
        if not steps:
            raise ValueError(f"{run} has no permanent checkpoint: checkpoint.keep_every_tokens keeps some.")
    for step in steps:
        if step not in found:
            raise ValueError(f"step = {step} is not valid: {run} has checkpoints of {', '.join(map(str, found))}.")
        if (problem := found[step].problem) is not None:
            raise ValueError(problem)
    for step in steps:
        target = folder / revision_name(found[step].tokens)
        yield to_hf(found[step].path, target, Options(), "bfloat16", "baichuan2", "bin", math.inf)
