"""Runs on pairs of answers: direct preference optimization and reward models."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from bc2_jax.config.finetune import AskedConfig, TunedConfig
from bc2_jax.validation import check_fields, require

PreferenceLoss = Literal["sigmoid", "cdpo", "ipo", "ipo_mean", "hinge", "robust", "sigmoid_norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOOptions:
    """Direct preference optimization (arXiv 2305.18290)."""

    loss: PreferenceLoss = "sigmoid"
    """Loss of a pair (docs/preferences.md)."""
    beta: float = 0.1
    """Strength of the tie of the policy to the reference."""
    label_smoothing: float = 0.0
    """Assumed share of pairs with wrong labels, for cdpo and robust."""
    sft_weight: float = 0.0
    """Weight of the cross entropy of the chosen answer, the mean over its tokens, in the loss of a pair; 0: none."""
    reference_cache: str = "~/.cache/bc2_jax/reference"
    """Cache folder of the reference's log-probabilities, for other runs from the same model on the same pairs; the run
    keeps a copy in its workdir."""

    def __post_init__(self) -> None:
        check_fields(self, "dpo.", ("beta",), not_negative=("sft_weight",))
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "dpo.label_smoothing", smoothing, "it must be in [0, 0.5)")
        smooths = self.loss in ("cdpo", "robust")
        require(
            smooths or smoothing == 0, "dpo.label_smoothing", smoothing,
            f"it must be 0 with dpo.loss = {self.loss!r}; only cdpo and robust have it",
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(AskedConfig):
    """Preference tuning on pairs."""

    row_kinds: ClassVar[tuple[str, ...]] = ("pairs",)
    dpo: DPOOptions = DPOOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = "it must be 0: with dropout the policy would differ from its reference before the first step"
        require(self.lora.dropout == 0, "lora.dropout", self.lora.dropout, legal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Loss of a reward model (arXiv 2203.02155)."""

    use_margins: bool = True
    """Subtract the margin of a pair, if the data has one, from the difference of its rewards."""
    centring: float = 0.01
    """Weight of the squared sum of both rewards of a pair, which keeps rewards around 0; 0: none."""

    def __post_init__(self) -> None:
        check_fields(self, "reward.", not_negative=("centring",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(TunedConfig):
    """Training of a reward model on pairs."""

    row_kinds: ClassVar[tuple[str, ...]] = ("pairs",)
    reward: RewardOptions = RewardOptions()
