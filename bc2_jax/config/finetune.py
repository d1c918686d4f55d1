"""Runs that start from a model, and supervised fine-tuning on conversations."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bc2_jax.config.lora import LoraConfig
from bc2_jax.config.run import TrainConfig
from bc2_jax.validation import check_fields, require

TOKENIZER_OF_BASE = "that of init_from"
"""Value of `data.tokenizer` that means the tokenizer of the base model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """Questions answered greedily at each evaluation."""

    path: str | None = "auto"
    """JSON Lines of conversations whose last message is the expected answer. auto: questions.jsonl beside the rows of
    the first source with one (tools/prepare_chat.py); None: no questions."""
    limit: int = 64
    """Number of questions, from the start of the file; 0: all."""
    max_new_tokens: int = 128
    """Longest answer in tokens; a longer one is cut and counts as not ended."""
    show: int = 3
    """Answers printed at each evaluation."""

    def __post_init__(self) -> None:
        check_fields(self, "questions.", ("max_new_tokens",), not_negative=("limit", "show"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedConfig(TrainConfig):
    """A run on packed rows that starts from a model and trains all parameters, or adapters beside frozen ones."""

    lora: LoraConfig = LoraConfig()
    num_epochs: float | None = None
    """Passes over the rows of all sources together after which run and learning rate decay end, unless num_steps ends
    them before. None: only num_steps counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs = self.num_epochs
        require(epochs is None or epochs > 0, "num_epochs", epochs, "it must be positive, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedConfig(TunedConfig):
    """A `TunedConfig` with questions at each evaluation."""

    questions: QuestionsConfig = QuestionsConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneConfig(AskedConfig):
    """Supervised fine-tuning on rows of conversations (tools/prepare_chat.py)."""

    loss_weighting: Literal["token", "sample"] = "token"
    """What has the same weight in the loss of a batch: every target token, or every sample with targets."""
    neftune_alpha: float = 0.0
    """NEFTune (arXiv 2310.05914): in training, uniform noise up to alpha / sqrt(n * hidden_size) on the embeddings of a
    sample of n tokens; usually 5 to 15, 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.neftune_alpha >= 0, "neftune_alpha", self.neftune_alpha, "it must be at least 0")
