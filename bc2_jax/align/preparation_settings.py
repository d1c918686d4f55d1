"""Settings and counts of the preparation of packed rows."""

from __future__ import annotations

import dataclasses
from typing import get_args

from bc2_jax.align.chat_rows import Truncation
from bc2_jax.data.packing import check_packing
from bc2_jax.validation import choices, require

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What packed rows depend on, besides their input files and tokenizer."""

    max_length: int = 4096
    """Longest sample in tokens; of a pair, the prompt with the longer answer."""
    row_length: int | None = None
    """Tokens of a row; None: max_length. A pair is in one row with both answers."""
    validation_fraction: float = 0.01
    truncation: Truncation = "rounds"
    rows_per_file: int = 65_536
    max_invalid: int | None = None
    """Most unusable records before the preparation stops; None: no limit."""

    def __post_init__(self) -> None:
        require(self.max_length >= 1, "max_length", self.max_length, "it must be positive")
        legal = f"it must be at least max_length = {self.max_length}"
        require(self.inputs >= self.max_length, "row_length", self.row_length, legal)
        check_packing(self.inputs, self.validation_fraction, self.rows_per_file)
        legal_truncations = get_args(Truncation)
        ok = self.truncation in legal_truncations
        require(ok, "truncation", self.truncation, f"it must be {choices(legal_truncations)}")
        ok = self.max_invalid is None or self.max_invalid >= 0
        require(ok, "max_invalid", self.max_invalid, "it must be at least 0, or None")

    @property
    def inputs(self) -> int:
        """Tokens of a row."""
        return self.max_length if self.row_length is None else self.row_length


@dataclasses.dataclass
class FileCounts:
    """What was read of one file."""

    path: str
    size: int
    """Bytes, as stored."""
    formats: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples by format."""
    invalid: int = 0
    """Unusable records."""


@dataclasses.dataclass
class Conversations:
    """Counts of what was read, left out, cut and packed; written to conversations.json."""

    settings: RowSettings
    files: list[FileCounts] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Files of the input folders that do not hold conversations."""
    invalid: dict[str, int] = dataclasses.field(default_factory=dict)
    """Unusable records by reason."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Samples left out, by reason."""
    unanswered: int = 0
    """Samples without their last user message, which has no answer."""
    samples: int = 0
    """Samples in the rows; all counts below are of these."""
    pairs: int = 0
    """Preference pairs; rows of conversations hold their chosen answers."""
    margins: int = 0
    """Pairs with a known margin, in rows of pairs."""
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
    """Padding tokens in the rows."""
    held_out: int = 0
    """Samples for validation."""
    format: int = _FORMAT
