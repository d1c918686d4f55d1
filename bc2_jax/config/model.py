"""The architecture, and the released 7B and 13B models."""

from __future__ import annotations

import dataclasses
from typing import Literal

from bc2_jax.validation import check_fields, choices, divisors, require, require_at_most


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture (paper section 2.3, released `config.json`); equal configs mean interchangeable checkpoints."""

    hidden_size: int
    """Width D of the residual stream."""
    intermediate_size: int
    """Width F of the SwiGLU feed-forward layer."""
    num_hidden_layers: int
    """Number of decoder layers L."""
    num_attention_heads: int
    """Number of attention heads N; the head size is hidden_size / num_attention_heads."""
    position_embedding: Literal["rope", "alibi"]
    """RoPE (7B) or ALiBi (13B); not in the released config.json."""
    vocab_size: int = 125_696
    """Number of token ids V."""
    model_max_length: int = 4096
    """Longest trained context in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the variance in RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial linear and embedding weights."""
    rope_theta: float = 10_000.0
    """Base of the RoPE frequencies."""
    normalize_head: bool = True
    """NormHead: unit-norm rows of the output embedding (paper section 2.4). False for Baichuan 1."""
    z_loss_weight: float = 2e-4
    """Weight of the max-z loss (paper section 2.4); the released files ship 0."""
    pad_token_id: int = 0
    """Padding; its embedding row starts at zero."""
    bos_token_id: int = 1
    """Beginning of text; never added by Baichuan 2."""
    eos_token_id: int = 2
    """End of text; closes every document."""

    def __post_init__(self) -> None:
        positive = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
            "model_max_length", "rms_norm_eps", "initializer_range", "rope_theta",
        )  # fmt: skip
        check_fields(self, "model.", positive, not_negative=("z_loss_weight",))
        # Larger than any model, but safe for divisors, int32 positions and ids.
        require_at_most(
            self, "model.", hidden_size=1 << 20, intermediate_size=1 << 22, num_hidden_layers=10_000,
            vocab_size=1 << 26, model_max_length=(1 << 31) - 1,
        )  # fmt: skip
        hidden, heads = self.hidden_size, self.num_attention_heads
        legal = f"it must divide hidden_size = {hidden}; legal values are {choices(divisors(hidden))}"
        require(hidden % heads == 0, "model.num_attention_heads", heads, legal)
        is_legal = self.position_embedding != "rope" or self.head_dim % 2 == 0
        legal = f"RoPE needs an even head size, and {hidden} / {heads} is odd"
        require(is_legal, "model.num_attention_heads", heads, legal)
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            require(0 <= value < self.vocab_size, f"model.{field}", value, f"it must be in 0..{self.vocab_size - 1}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def num_parameters(self) -> int:
        """Exact number of parameters: 7,505,973,248 for 7B, 13,896,668,160 for 13B."""
        layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return 2 * self.vocab_size * self.hidden_size + self.num_hidden_layers * layer + self.hidden_size

    def flops_per_sequence(self, length: int) -> int:
        """Model FLOPs to train on one sequence of `length` tokens, forward and backward, without recomputation.

        6 * matmul parameters * length + 6 * L * D * length * (length + 1) for causal attention; matmul parameters
        include the head, but not the embedding."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        matmul = self.num_parameters() - self.vocab_size * self.hidden_size - norms
        return 6 * matmul * length + 6 * self.num_hidden_layers * self.hidden_size * length * (length + 1)


BAICHUAN2_7B = ModelConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, position_embedding="rope"
)
BAICHUAN2_13B = ModelConfig(
    hidden_size=5120, intermediate_size=13696, num_hidden_layers=40, num_attention_heads=40, position_embedding="alibi"
)
