"""Supervised fine-tuning of a base model on conversations."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bc2_jax.config.lora import LoraConfig
from bc2_jax.config.run import TrainConfig
from bc2_jax.validation import require, require_positive, require_types

TOKENIZER_OF_BASE = "that of init_from"
"""As `data.tokenizer` of a `FineTuneConfig`: the tokenizer of the base model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """Questions that the model answers at each evaluation, greedily."""

    path: str | None = "auto"
    """JSON Lines of conversations, the last message of each the expected answer. auto: the held-out ones that
    tools/prepare_chat.py wrote to questions.jsonl of the first source that has them; None asks nothing."""
    limit: int = 64
    """How many of them are asked, the first ones; 0 for all."""
    max_new_tokens: int = 128
    """Longest answer in tokens; a longer one is cut and counts as one that does not end."""
    show: int = 3
    """Answers that are printed at each evaluation."""

    def __post_init__(self) -> None:
        require_types(self, "questions.")
        require_positive(self, "questions.", "max_new_tokens")
        for field in ("limit", "show"):
            require(getattr(self, field) >= 0, f"questions.{field}", getattr(self, field), "it must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedConfig(TrainConfig):
    """What all kinds of run have that train an existing model on packed rows: all parameters, or adapters beside
    frozen ones."""

    lora: LoraConfig = LoraConfig()
    num_epochs: float | None = None
    """Passes over the rows after which the run ends, if num_steps does not end it before, and with it the decay of the
    learning rate at the latest. A pass is as many rows as all sources have together. None: num_steps alone counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs = self.num_epochs
        require(epochs is None or epochs > 0, "num_epochs", epochs, "it must be positive, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskedConfig(TunedConfig):
    """What those of them have whose model is asked questions at each evaluation."""

    questions: QuestionsConfig = QuestionsConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneConfig(AskedConfig):
    """Supervised fine-tuning on rows of tools/prepare_chat.py."""

    loss_weighting: Literal["token", "sample"] = "token"
    """What has the same weight in the loss: every target (token) of a batch, or every sample of it that has targets."""
    neftune_alpha: float = 0.0
    """NEFTune (arXiv 2310.05914): uniform noise of up to alpha / sqrt(n * hidden_size) on the embeddings of a sample of
    n tokens, in training only; 5 to 15 are usual, 0 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.neftune_alpha >= 0, "neftune_alpha", self.neftune_alpha, "it must be at least 0")
