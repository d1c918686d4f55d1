"""Packed rows of tokens and how they are mixed."""

from __future__ import annotations

import dataclasses
import math

from bc2_jax.validation import check_fields, choices, divisors, require, require_local


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of packed rows."""

    path: str
    """Output of tools/tokenize_corpus.py or tools/prepare_chat.py: a corpus, a source of it, or a folder of rows."""
    weight: float = 1.0
    """Share of training tokens relative to the other weights; 0 keeps the source for a later stage."""
    quality_weights: tuple[float, ...] = ()
    """Factors of the source's quality buckets, worst first; empty: 1 each, that is the share of a bucket's rows times
    the mean sampling weight of its documents."""
    max_epochs: float | None = None
    """Most passes over this source; a run that would exceed it does not start. None: no limit."""

    def __post_init__(self) -> None:
        check_fields(self, "data.sources.", not_negative=("weight",))
        require_local("data.sources.path", self.path)
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
    """New mixture weights after a number of training tokens; each source continues at its position.

    A stage may be added to a run before it is reached, without a change of the rows read so far. Changing the weight of
    a source instead changes the whole order, so that rows would be repeated or missed.
    """

    start_tokens: int
    """Training tokens after which the stage begins, rounded up to whole rows."""
    weights: tuple[float, ...]
    """Weight of each source, in the order of the sources."""

    def __post_init__(self) -> None:
        check_fields(self, "data.stages.", positive=("start_tokens",))
        require(
            all(0 <= weight < math.inf for weight in self.weights) and any(self.weights),
            "data.stages.weights", self.weights, "each must be finite and at least 0, and one positive",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Packed rows of tokens and their mixture."""

    sources: tuple[SourceConfig, ...]
    """Sources of the mixture; their rows have sequence_length + 1 tokens."""
    stages: tuple[MixtureStage, ...] = ()
    """Later changes of the mixture, in order; until the first one the weights of the sources apply."""
    tokenizer: str
    """SentencePiece model that made the rows."""
    sequence_length: int = 4096
    """Tokens T of a row; positions restart at each document."""
    global_batch_size: int = 1024
    """Rows of an optimizer step, over all devices and accumulation steps."""
    accumulation_steps: int = 1
    """Forward and backward passes (micro-batches) of an optimizer step; all tokens have the same weight."""
    seed: int = 0
    """Seed of the row order."""
    max_bad_rows: int = 0
    """Unreadable rows that each process may replace with padding before the run stops; the log names each."""

    def __post_init__(self) -> None:
        positive = ("sequence_length", "global_batch_size", "accumulation_steps")
        check_fields(self, "data.", positive, not_negative=("seed", "max_bad_rows"))
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
            self.global_batch_size % self.accumulation_steps == 0, "data.accumulation_steps", self.accumulation_steps,
            f"it must divide data.global_batch_size = {self.global_batch_size}; "
            f"legal values are {choices(divisors(self.global_batch_size))}",
        )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def stage_rows(self) -> tuple[int, ...]:
        """First row of each of `stages`."""
        return tuple(-(-stage.start_tokens // self.sequence_length) for stage in self.stages)
