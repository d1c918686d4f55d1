"""Packed rows of tokens and how they are mixed."""

from __future__ import annotations

import dataclasses
import math

from bc2_jax.validation import choices, divisors, require, require_local, require_positive, require_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Packed rows that are drawn together."""

    path: str
    """What tools/tokenize_corpus.py wrote: the whole corpus, the folder of a source in it, or one folder of rows."""
    weight: float = 1.0
    """Share of training tokens drawn from this source, relative to the other weights; 0 keeps it for a later stage."""
    quality_weights: tuple[float, ...] = ()
    """Factors for the quality buckets of the source, the worst first; empty for 1 each. Without them a bucket has the
    share of its rows times the mean sampling weight of its documents."""
    max_epochs: float | None = None
    """How often the run may read a row of this source; a run that would exceed it does not start. None: no limit."""

    def __post_init__(self) -> None:
        require_types(self, "data.sources.")
        require_local("data.sources.path", self.path)
        require(self.weight >= 0, "data.sources.weight", self.weight, "it must be at least 0")
        require(
            all(0 <= weight < math.inf for weight in self.quality_weights),
            "data.sources.quality_weights", self.quality_weights, "each must be finite and at least 0",
        )  # fmt: skip
        require(
            self.max_epochs is None or self.max_epochs > 0,
            "data.sources.max_epochs", self.max_epochs, "it must be positive, or None for no limit",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """Other mixture weights from a given number of training tokens on; each source continues where it was.

    A run that is resumed with a stage added behind its step has read what it would have read with it from the start. A
    changed weight of a source, in contrast, changes the whole order: rows would be read again or never.
    """

    start_tokens: int
    """Tokens after which it begins, rounded up to a whole row."""
    weights: tuple[float, ...]
    """In place of the weight of each source, in their order."""

    def __post_init__(self) -> None:
        require_types(self, "data.stages.")
        require_positive(self, "data.stages.", "start_tokens")
        require(
            all(0 <= weight < math.inf for weight in self.weights) and any(self.weights),
            "data.stages.weights", self.weights, "each must be finite and at least 0, and one positive",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Packed token rows and how they are drawn."""

    sources: tuple[SourceConfig, ...]
    """What is mixed; rows have sequence_length + 1 tokens."""
    stages: tuple[MixtureStage, ...] = ()
    """Changes of the mixture in the course of the run, in their order; before the first, the weights of the sources."""
    tokenizer: str
    """SentencePiece model the rows were made with."""
    sequence_length: int = 4096
    """Tokens a row, T; positions restart at each document."""
    global_batch_size: int = 1024
    """Rows per optimizer step over all devices and accumulation steps."""
    accumulation_steps: int = 1
    """Forward and backward passes per optimizer step; each token of the step has the same weight."""
    seed: int = 0
    """Seed of the row order."""
    max_bad_rows: int = 0
    """Unreadable rows that each process may replace with padding, from its start on, before the run stops; the log
    names each."""

    def __post_init__(self) -> None:
        require_types(self, "data.")
        require(self.seed >= 0, "data.seed", self.seed, "it must be at least 0")
        require_positive(self, "data.", "sequence_length", "global_batch_size", "accumulation_steps")
        require(self.max_bad_rows >= 0, "data.max_bad_rows", self.max_bad_rows, "it must be at least 0")
        require(len(self.sources) > 0, "data.sources", self.sources, "at least one source is needed")
        require(
            any(source.weight for source in self.sources),
            "data.sources.weight", 0.0, "the run must begin with a source whose weight is positive",
        )  # fmt: skip
        for index, source in enumerate(self.sources):
            require(
                source.weight > 0 or any(stage.weights[index : index + 1] > (0,) for stage in self.stages),
                "data.sources.weight", source.weight, f"no stage reads {source.path!r} either; leave the source out",
            )  # fmt: skip
        for stage in self.stages:
            require(
                len(stage.weights) == len(self.sources),
                "data.stages.weights", stage.weights, f"it needs one for each of the {len(self.sources)} data.sources",
            )  # fmt: skip
        starts = self.stage_rows
        for before, after, stage in zip((0, *starts), starts, self.stages, strict=False):
            require(
                before < after,
                "data.stages.start_tokens", stage.start_tokens,
                f"it must be at least a row, {self.sequence_length} tokens, after the stage before",
            )  # fmt: skip
        require(
            self.global_batch_size % self.accumulation_steps == 0,
            "data.accumulation_steps",
            self.accumulation_steps,
            f"it must divide data.global_batch_size = {self.global_batch_size}; "
            f"legal values are {choices(divisors(self.global_batch_size))}",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def stage_rows(self) -> tuple[int, ...]:
        """Row of the run with which each of `stages` begins: its tokens, rounded up to whole rows."""
        return tuple(-(-stage.start_tokens // self.sequence_length) for stage in self.stages)
