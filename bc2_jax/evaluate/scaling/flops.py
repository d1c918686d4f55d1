"""Training FLOPs of a run: layers, head and attention."""

from __future__ import annotations

from typing import NamedTuple

from bc2_jax.config import ModelConfig


class Compute(NamedTuple):
    """Training FLOPs, forward and backward, without recomputation."""

    layers: float  # 6 x matmul parameters of the layers x tokens
    head: float  # 6 x parameters of the head x tokens, most of a small model's compute
    attention: float  # causal attention of each row

    @property
    def total(self) -> float:
        return self.layers + self.head + self.attention


def training_compute(model: ModelConfig, tokens: float, length: int) -> Compute:
    """FLOPs of `tokens` tokens in rows of `length`."""
    head = 6 * model.vocab_size * model.hidden_size * tokens
    attention = 6 * model.num_hidden_layers * model.hidden_size * (length + 1) * tokens
    return Compute(model.flops_per_sequence(length) / length * tokens - head - attention, head, attention)


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters of layers and head, without embedding and norms."""
    return non_embedding_parameters(model) + model.vocab_size * model.hidden_size


def non_embedding_parameters(model: ModelConfig) -> int:
    """Matmul parameters of the layers alone."""
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    return model.num_parameters() - 2 * model.vocab_size * model.hidden_size - norms
