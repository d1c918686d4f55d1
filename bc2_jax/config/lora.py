"""Low-rank adapters (LoRA)."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from bc2_jax.validation import check_fields, choices, require

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): y = W x + scaling * B A x; A and B are trained, W stays as it is."""

    rank: int = 0
    """Rank r of the adapters; 0 trains all parameters instead."""
    alpha: float = 32.0
    """Scaling is alpha / rank, or alpha / sqrt(rank) with rslora."""
    targets: tuple[LoraTarget, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Matrices with adapters. W_pack is the released matrix of queries, keys and values, which then share A."""
    ranks: tuple[int, ...] = ()
    """Rank of each of `targets`, in order; (): `rank` for all."""
    alphas: tuple[float, ...] = ()
    """Alpha of each of `targets`, in order; (): `alpha` for all."""
    dropout: float = 0.0
    """Dropout probability of an adapter's inputs in training."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """DoRA (arXiv 2402.09353): also train the norm of each row of the adapted matrix."""

    def __post_init__(self) -> None:
        check_fields(self, "lora.", ("alpha",), not_negative=("rank",))
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "it must be in [0, 1)")
        require(len(self.targets) > 0, "lora.targets", self.targets, "at least one is needed")
        for target in self.targets:
            require(target in LORA_TARGETS, "lora.targets", target, f"legal values are {choices(LORA_TARGETS)}")
            require(self.targets.count(target) == 1, "lora.targets", target, "it is named more than once")
        parts = [target for target in ("q_proj", "k_proj", "v_proj") if target in self.targets]
        require(
            "W_pack" not in self.targets or not parts, "lora.targets", self.targets,
            f"W_pack is {', '.join(parts)} as one matrix: name W_pack or its parts",
        )  # fmt: skip
        for field in ("ranks", "alphas"):
            values = getattr(self, field)
            known = len(values) in (0, len(self.targets)) and all(value > 0 for value in values)
            require(known, f"lora.{field}", values, "it must be empty or one positive number for each of lora.targets")

    def rank_of(self, target: LoraTarget) -> int:
        """Rank of the adapter of one of `targets`."""
        return self.ranks[self.targets.index(target)] if self.ranks else self.rank

    def scaling_of(self, target: LoraTarget) -> float:
        """Scaling of one of `targets`."""
        alpha, rank = self.alphas[self.targets.index(target)] if self.alphas else self.alpha, self.rank_of(target)
        return alpha / (rank**0.5 if self.rslora else rank)

    def describe(self) -> str:
        """One line for messages."""
        kinds = ", ".join(["LoRA", *(["rsLoRA"] * self.rslora), *(["DoRA"] * self.dora)])
        each = (f"{t} (rank {self.rank_of(t)}, scaling {self.scaling_of(t):.4g})" for t in self.targets)
        return f"{kinds} on {', '.join(each)}"
