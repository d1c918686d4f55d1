"""What is asked of a preparation of packed rows, and what it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

from bc2_jax.align.chat_rows import EncodedSamples, Truncation
from bc2_jax.align.formats import Sample
from bc2_jax.data.packing import Kind, check_packing
from bc2_jax.data.records import Invalid
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import choices, require

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What rows depend on, besides their input and tokenizer."""

    max_length: int = 4096
    """Tokens of the longest sample; of a pair those of the prompt with the longer answer."""
    row_length: int | None = None
    """Tokens of a row; None: max_length. A pair is in one row with both answers."""
    validation_fraction: float = 0.01
    truncation: Truncation = "rounds"
    rows_per_file: int = 65_536
    max_invalid: int | None = None
    """Records that may be invalid before it is an error; None: any number."""

    def __post_init__(self) -> None:
        require(self.max_length >= 1, "max_length", self.max_length, "it must be positive")
        require(
            self.inputs >= self.max_length, "row_length", self.row_length,
            f"it must be at least max_length = {self.max_length}",
        )  # fmt: skip
        check_packing(self.inputs, self.validation_fraction, self.rows_per_file)
        legal = get_args(Truncation)
        require(self.truncation in legal, "truncation", self.truncation, f"it must be {choices(legal)}")
        ok = self.max_invalid is None or self.max_invalid >= 0
        require(ok, "max_invalid", self.max_invalid, "it must be at least 0, or None")

    @property
    def inputs(self) -> int:
        """Tokens of a row."""
        return self.max_length if self.row_length is None else self.row_length


class Content(NamedTuple):
    """What is packed: conversations, or pairs."""

    kind: Kind
    accept: Callable[[Sample | Invalid], Sample | Invalid]
    """What was read of a record, or Invalid where that is of another kind."""
    text: Callable[[Sample], Any]
    """What is encoded of a sample."""
    encode: Callable[[Tokenizer, Settings, Sequence[Any]], EncodedSamples]
    """Encodes texts; a function of a module, for it runs in other processes."""
    held_out: str
    """Name of the file of the held-out samples."""
    describe: Callable[[Sample], dict[str, Any]]
    """What stands there of one, JSON values."""


@dataclasses.dataclass
class FileCounts:
    """What was found in one file."""

    path: str
    size: int
    """Bytes, as stored."""
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples in each format, by its name."""
    invalid: int = 0
    """Records that can't be used."""


@dataclasses.dataclass
class Conversations:
    """What was read and what became of it."""

    settings: Settings
    files: list[FileCounts] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Files of the folders that are none of conversations."""
    invalid: dict[str, int] = dataclasses.field(default_factory=dict)
    """Records that can't be used, by the reason."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples that were left out, by the reason."""
    unanswered: int = 0
    """Samples whose last user message was left out, because it has no answer."""
    samples: int = 0
    """Those in the rows; so are all numbers below."""
    pairs: int = 0
    """Of them, preference pairs; in rows of conversations the chosen answer is trained on."""
    margins: int = 0
    """Of them, pairs of a known margin, where rows are of pairs."""
    shortened: int = 0
    """Samples that lost their oldest rounds."""
    dropped_rounds: int = 0
    cut: int = 0
    """Samples that lost their end."""
    cut_tokens: int = 0
    turns: int = 0
    """Answers."""
    tokens: int = 0
    targets: int = 0
    rows: int = 0
    padding: int = 0
    """Inputs of the rows that are not tokens."""
    held_out: int = 0
    """Samples for validation."""
    format: int = _FORMAT
