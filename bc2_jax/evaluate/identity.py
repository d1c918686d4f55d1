"""The identity of a folder of results: one model, tokenizer, precision, and set of prompts per benchmark."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from bc2_jax.align.red_team import identify
from bc2_jax.align.tuning import checksum
from bc2_jax.config import DType
from bc2_jax.convert.pretrained import find_model, find_tokenizer
from bc2_jax.evaluate.asking import Questions
from bc2_jax.evaluate.records import NAME as RECORDS
from bc2_jax.evaluate.records import write_json
from bc2_jax.files import file_sha256
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.validation import require

NAME = "evaluation.json"
_SETTINGS = {
    "tokenizer_sha256": "another tokenizer", "dtype": "another dtype", "max_length": "another max_length"
}  # fmt: skip
_NEEDED = {"model", "files", "checksum", "tasks", *_SETTINGS}
_NEEDED_OF_TASK = {"shots", "prompts_sha256"}  # fields of evaluation.json, and of each of its tasks


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on disk to evaluate."""

    path: Path
    adapter: Path | None = None
    dtype: DType = "bfloat16"
    max_length: int | None = None
    tokenizer: Path | None = None  # by default the one beside the model

    def __post_init__(self) -> None:
        require(self.max_length is None or self.max_length > 0, "max_length", self.max_length, "it must be positive")

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer or find_tokenizer(self.path)

    def describe(self) -> dict[str, Any]:
        """Its identity as JSON; for a checkpoint of a run also step and trained tokens."""
        found = find_model(self.path)
        is_step = found.format == "orbax" and found.path.name.isdigit()
        return {
            "model": str(found.path.absolute()), "step": int(found.path.name) if is_step else None,
            "tokens": found.metadata.get("tokens"), "files": identify(self.path, self.adapter),
            "adapter": None if self.adapter is None else str(self.adapter.absolute()),
            "tokenizer_sha256": file_sha256(self.tokenizer_path), "dtype": self.dtype,
            "max_length": found.config.model_max_length if self.max_length is None else self.max_length,
        }  # fmt: skip


def checksum_of(model: Baichuan2) -> str:
    """Checksum of all parameters with the adapter's, in hex; the same on every mesh."""
    return f"{checksum(nnx.to_pure_dict(nnx.split(model)[1])):08x}"


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The content of FOLDER/evaluation.json; None without the file. Raises ValueError if it is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_bytes())
        is_whole = about.keys() >= _NEEDED and all(then.keys() >= _NEEDED_OF_TASK for then in about["tasks"].values())
    except (ValueError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged: choose another --out.")
    return dict(about)


def claim(folder: Path, about: Mapping[str, Any], asked: Sequence[Questions]) -> bool:
    """Adds benchmarks of the model `about` (`Model.describe`) to FOLDER.

    Returns whether existing results are of the same model files; if not, call `settle` with the checksum of the
    parameters. Raises ValueError, before writing, if they are of other settings or other prompts.
    """
    before = read_identity(folder)
    tasks = _prompts_of(asked)
    has_records = any(folder.glob(f"*/{RECORDS}"))
    if before is None and has_records:
        raise ValueError(f"{folder} has records but no {NAME} that says of which model: choose another --out.")
    if before is None or not has_records:
        write_json(folder / NAME, {**about, "checksum": None, "tasks": tasks})
        return True
    require_same_asking(folder, before, about, asked)
    write_json(folder / NAME, before | {"tasks": before["tasks"] | tasks})
    return bool(before["files"] == about["files"])


def require_same_asking(
    folder: Path, before: Mapping[str, Any], about: Mapping[str, Any], asked: Sequence[Questions]
) -> None:
    """Raises ValueError if the identity `before` in `folder` has other settings than `about`, or other prompts."""
    for name, other in _SETTINGS.items():
        if before[name] != about[name]:
            raise ValueError(
                f"{folder} has results of {other} ({name} {before[name]}, now {about[name]}): choose another --out."
            )
    for name, now in _prompts_of(asked).items():
        if (then := before["tasks"].get(name, now)) != now:
            differs = f"{then['shots']} shots, now {now['shots']}" if then["shots"] != now["shots"] else "other files"
            raise ValueError(f"{folder} has records of other prompts of {name} ({differs}): choose another --out.")


def _prompts_of(asked: Sequence[Questions]) -> dict[str, dict[str, Any]]:
    return {q.task.name: {"shots": q.shots, "prompts_sha256": q.prompts_sha256} for q in asked}


def settle(folder: Path, about: Mapping[str, Any], found: str) -> None:
    """Records the parameters' checksum `found`. Raises ValueError if the results are of other parameters."""
    before = read_identity(folder)
    assert before is not None  # claim wrote it
    is_known = before["checksum"] is not None or before["files"] == about["files"]
    if not is_known or before["checksum"] not in (None, found):
        raise ValueError(
            f"{folder} has results of another model ({before['model']}, checksum {before['checksum']}; now "
            f"{about['model']}, {found}): choose another --out."
        )
    write_json(folder / NAME, before | {"checksum": found, "files": about["files"]})
