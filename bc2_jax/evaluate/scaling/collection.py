"""Collects final held-out losses from run folders or from a table of points."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.checkpoint import TOKENIZER_NAME
from bc2_jax.config import TrainConfig
from bc2_jax.data.corpus import list_parts
from bc2_jax.evaluate.scaling.flops import matmul_parameters, training_compute
from bc2_jax.files import file_sha256
from bc2_jax.train.kinds import read_config
from bc2_jax.train.metrics import read_metrics
from bc2_jax.validation import show

LOSS = "validation_cross_entropy"
"""Nats per token on held-out text at the end of the run, without the max-z loss."""
_COLUMNS = ("N", "D", "C", "loss")


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished run."""

    name: str
    N: float  # matmul parameters with the head, without the embedding
    D: float  # tokens
    C: float  # FLOPs: layers, head and attention
    loss: float  # final, nats per token on held-out text


@dataclasses.dataclass(frozen=True)
class Points:
    """Comparable runs."""

    points: tuple[Point, ...]
    bits_per_byte: float | None = None
    """Bits per byte of one nat per token on their held-out text; None if its bytes are unknown."""
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Run:
    path: Path
    config: TrainConfig
    tokenizer: str
    held_out: tuple[Any, ...]  # equal for runs with the same held-out text
    point: Point
    bits_per_byte: float | None


def collect(paths: Sequence[str | Path]) -> Points:
    """The finished runs in these folders, smallest compute first.

    Warns of unfinished runs (left out), schedules that do not end at the run's last step, and runs that began from
    another model. Raises ValueError for a folder without a pre-training run, a run given twice, no finished run, and
    runs with different tokenizers or held-out text.
    """
    runs, warnings, seen = [], [], dict[Path, str]()
    for path in map(Path, paths):
        if (real := path.resolve()) in seen:
            raise ValueError(f"{path} is given twice: each run counts once.")
        seen[real] = str(path)
        found = _read_run(path)
        if isinstance(found, str):
            warnings.append(found)
            continue
        runs.append(found)
        optimizer, steps = found.config.optimizer, found.config.num_steps
        if optimizer.decay_steps != steps:
            warnings.append(
                f"{path}: the learning rate reaches its minimum at step {optimizer.decay_steps:,} and the run ends at "
                f"{steps:,}: its loss is not that of a schedule of its own length."
            )
        if found.config.init_from is not None:
            warnings.append(
                f"{path}: it began from {found.config.init_from}, whose training is not counted: its tokens and "
                "compute are too few for its loss."
            )
    if not runs:
        raise ValueError(" ".join(warnings) or "no run is given.")
    first = next((run for run in runs if run.held_out[-1]), runs[0])
    for run in runs:
        if run.tokenizer != first.tokenizer:
            raise ValueError(
                f"{run.path} and {first.path} have different tokenizers: their losses a token can't be compared."
            )
        if not _is_same_text(run, first):
            raise ValueError(
                f"{run.path} and {first.path} are not evaluated on the same held-out text: "
                f"{_describe(run)} and {_describe(first)}; their losses can't be compared."
            )
    runs.sort(key=lambda run: run.point.C)
    per_nat = next((run.bits_per_byte for run in runs if run.bits_per_byte is not None), None)
    return Points(tuple(run.point for run in runs), per_nat, tuple(warnings))


def _is_same_text(run: _Run, other: _Run) -> bool:
    """As far as known: the rows of a run may have been deleted."""
    *counts, digest = run.held_out
    *other_counts, other_digest = other.held_out
    return counts == other_counts and (digest == other_digest or not digest or not other_digest)


def _describe(run: _Run) -> str:
    tokens, batches, length, digest = run.held_out
    share = f", {batches} batches" if batches else ""
    return f"{tokens:,.0f} targets in rows of {length:,}{share}" + (f" ({digest[:8]})" if digest else "")


def _read_run(path: Path) -> _Run | str:
    """A finished run, or why it is left out."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not the folder of a run: it has no config.json.")
    try:
        config = read_config(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not the config of a run of this version: {error}") from error
    if type(config) is not TrainConfig:
        raise ValueError(f"{path} is a run of {type(config).__name__}: a ladder is made of runs of pre-training.")
    lines = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
    done = max((line["step"] for line in lines), default=0)
    last = next((line for line in lines if line["step"] == config.num_steps and LOSS in line), None)
    if done < config.num_steps:
        return f"{path} is not finished, at step {done:,} of {config.num_steps:,}: left out."
    if last is None or not isinstance(last[LOSS], int | float) or not math.isfinite(last[LOSS]):
        return f"{path} has no finite loss on held-out text at its last step, {config.num_steps:,}: left out."
    tokens = last.get("trained_tokens") or config.num_steps * config.tokens_per_step
    length, model = config.data.sequence_length, config.model
    point = Point(
        str(path), matmul_parameters(model), tokens, training_compute(model, tokens, length).total, float(last[LOSS])
    )
    kept = path / TOKENIZER_NAME
    targets = float(last.get("validation_tokens", math.nan))
    digest, size = _held_out_files(config)
    per_nat = targets / size / math.log(2) if size and not config.eval_batches else None
    held_out = (targets, config.eval_batches, length, digest)
    return _Run(path, config, file_sha256(kept) if kept.is_file() else "", held_out, point, per_nat)


def _held_out_files(config: TrainConfig) -> tuple[str, int]:
    """(checksums of the held-out files, bytes of text); ("", 0) if they have been deleted."""
    names, size = [], 0
    try:
        for source in config.data.sources:
            for part in list_parts(source.path):
                names += [info.sha256 for info in part.manifest.validation.files]
                size += part.manifest.validation.bytes
    except (ValueError, OSError):
        return "", 0
    return "".join(sorted(names)), size


def read_points(path: str | Path, chosen: str = "", compared: str | None = None) -> tuple[Points, tuple[Point, ...]]:
    """(points to fit, measured points to compare with predictions) of a CSV file with columns of names, N, D, C, loss.

    Rows whose name matches `compared` (re.search) are compared, others that match `chosen` are fitted. C defaults to
    6 N D. Raises ValueError, naming file and line, for other than positive numbers, and for missing columns or rows.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}.") from error
    if "loss" not in header or not ({"N", "D"} <= set(header) or "C" in header):
        raise ValueError(f"{path} has the columns {', '.join(header)}: it must have loss, and N and D or C.")
    label = next((name for name in header if name not in _COLUMNS), None)
    fitted: list[Point] = []
    others: list[Point] = []
    for number, row in enumerate(rows, 2):
        name = str(row[label]) if label else f"line {number}"
        is_compared = compared is not None and _matches("--compare", compared, name)
        if not is_compared and not _matches("--fit-on", chosen, name):
            continue
        values = {key: _number(path, number, key, row[key]) for key in _COLUMNS if key in header}
        if "C" not in values:
            values["C"] = 6 * values["N"] * values["D"]
        values = {"N": math.nan, "D": math.nan} | values
        (others if is_compared else fitted).append(Point(name, **values))
    if not fitted:
        raise ValueError(f"{path} has no row" + (f" whose {label} matches {chosen!r}." if chosen else "."))
    return Points(tuple(sorted(fitted, key=lambda point: point.C))), tuple(others)


def _matches(option: str, pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{option} = {show(pattern)} is not valid: {error}.") from error


def _number(path: Path, line: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{path}, line {line}: {name} = {show(text)} is not valid: it must be a positive number.")
    return value


def column(points: Iterable[Point], name: str) -> list[float]:
    """A field of all points."""
    return [getattr(point, name) for point in points]
