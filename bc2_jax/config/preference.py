"""Preferences between two answers: direct optimization of a policy, and reward models."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from bc2_jax.config.finetune import AskedConfig, TunedConfig
from bc2_jax.validation import require, require_literals, require_positive, require_types

PreferenceLoss = Literal["sigmoid", "cdpo", "ipo", "ipo_mean", "hinge", "robust", "sigmoid_norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOOptions:
    """Direct preference optimization (arXiv 2305.18290)."""

    loss: PreferenceLoss = "sigmoid"
    """Of d, by how much more the policy prefers the chosen answer than the reference does (`preference.dpo_loss`)."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be wrong: for cdpo and robust."""
    sft_weight: float = 0.0
    """Weight of the cross entropy of the chosen answers beside the loss: of each pair, the mean over the tokens of its
    chosen answer; 0 is none."""
    reference_cache: str = "~/.cache/bc2_jax/reference"
    """Folder in which the reference's log-probabilities are kept for other runs from the same model on the same pairs;
    the run's own copy is in its workdir."""

    def __post_init__(self) -> None:
        require_literals(self, "dpo.")
        require_types(self, "dpo.")
        require_positive(self, "dpo.", "beta")
        require(self.sft_weight >= 0, "dpo.sft_weight", self.sft_weight, "it must be at least 0")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "dpo.label_smoothing", smoothing, "it must be in [0, 0.5)")
        smooths = self.loss in ("cdpo", "robust")
        require(
            smooths or smoothing == 0, "dpo.label_smoothing", smoothing,
            f"it must be 0 with dpo.loss = {self.loss!r}; cdpo and robust have it",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(AskedConfig):
    """Preference tuning on pairs of answers."""

    row_kinds: ClassVar[tuple[str, ...]] = ("pairs",)
    dpo: DPOOptions = DPOOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        dropout = self.lora.dropout
        require(
            dropout == 0, "lora.dropout", dropout,
            "it must be 0: with some of it left out the policy would not be its reference even before the first step",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """A reward model: a scalar for each answer, trained on pairs (arXiv 2203.02155)."""

    use_margins: bool = True
    """Ask for the margin of each pair between the rewards of both answers, where the data has one."""
    centring: float = 0.01
    """Weight of the squared sum of both rewards of a pair, which keeps rewards around 0; 0 is none."""

    def __post_init__(self) -> None:
        require_types(self, "reward.")
        require(self.centring >= 0, "reward.centring", self.centring, "it must be at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(TunedConfig):
    """Training of a reward model on pairs of answers."""

    row_kinds: ClassVar[tuple[str, ...]] = ("pairs",)
    reward: RewardOptions = RewardOptions()
