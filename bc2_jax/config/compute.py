"""Config of the numerics of a model, and what rematerialisation keeps."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bc2_jax.validation import check_fields, require

DType = Literal["float32", "bfloat16"]
_DOTS = ("q", "k", "v", "attention", "o", "gate", "up")
REMAT_NAMES = (*_DOTS, "down_proj")
"""What the backward pass of a layer reads and `ComputeConfig.remat` can keep, in the order of computation."""
REMAT_POLICIES = {
    "none": _DOTS, "full": (), "save_dots": _DOTS, "save_projections": _DOTS[:5],
    "save_attention": ("attention",), "offload": _DOTS,
}  # fmt: skip
"""What each policy keeps of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; affects speed and memory, not what is learnt."""

    dtype: DType = "bfloat16"
    """Dtype of matmuls and activations. Master weights, norms, softmax, logits and losses are always float32."""
    attention: Literal["reference", "chunked", "flash"] = "chunked"
    """reference: one einsum, holds [heads, T, S]. chunked: online softmax over blocks, memory linear in length. flash:
    the same as kernels, Pallas on TPU and cuDNN on an NVIDIA GPU."""
    attention_block: int = 512
    """Queries and keys per block of the chunked attention."""
    remat: str = "full"
    """What each layer keeps for the backward pass; the rest is computed again. none: everything is kept. full: only the
    layer's input. save_dots: all matmul results. save_projections: those of attention. save_attention: the attention
    result. offload: all matmul results, in host memory. Or a comma-separated list of q, k, v, attention, o, gate, up
    and down_proj; the last is not a result but the gathered weight, without which the backward pass cannot begin."""
    scan_layers: bool = True
    """Compile one layer and loop over it, instead of all layers."""
    compiler_options: Literal["tuned", "default"] = "tuned"
    """On TPU: options of bc2_jax/tpu/options.py for its generation, or the compiler's defaults."""
    loss_chunk: int = 1024
    """Tokens per device whose logits exist at a time in the loss. If all are one chunk, the head is gathered and its
    gradient reduced in pieces of the vocabulary, which a TPU overlaps with their matmuls."""

    def __post_init__(self) -> None:
        check_fields(self, "compute.", ("attention_block", "loss_chunk"))
        names = self.remat.split(",")
        require(
            self.remat in REMAT_POLICIES or (set(names) <= set(REMAT_NAMES) and len(set(names)) == len(names)),
            "compute.remat", self.remat,
            f"it must be one of {', '.join(REMAT_POLICIES)}, or a comma-separated list of {', '.join(REMAT_NAMES)}, "
            "each at most once, without blanks",
        )  # fmt: skip

    @property
    def kept(self) -> tuple[str, ...]:
        """Those of `REMAT_NAMES` that `remat` keeps."""
        return REMAT_POLICIES[self.remat] if self.remat in REMAT_POLICIES else tuple(self.remat.split(","))
