"""Baichuan 2's forward pass in PyTorch, an independent reference for our model.

Written from the paper and the released layout, without shared code: it uses the PyTorch names, keeps W_pack fused,
builds the whole attention matrix and adds ALiBi as a bias, all in fp32. One layer's weights and some head rows are in
memory at a time. Only `tools/check_parity.py --torch` and tests import it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch.nn import functional

from bc2_jax.config import ModelConfig
from bc2_jax.convert.mapped import MappedTensor
from bc2_jax.convert.parity import Outputs, check_ids

_HEAD_ROWS = 16_384


@torch.inference_mode()
def forward(config: ModelConfig, tensors: Mapping[str, MappedTensor], input_ids: np.ndarray) -> Outputs:
    """fp32 logits [B, T, V] and hidden states [L + 1, B, T, D] of full rows of token ids [B, T].

    `tensors` is `hf.open_folder` of a folder that passes `hf.check_tensors`, in the released layout or LLaMA's. Paper
    sections 2.1 and 2.3 for the layers, 2.4 for NormHead. Raises ValueError for ids without a row.
    """
    check_ids(input_ids, config)
    # Index first, so that the whole table is never read.
    h = to_tensor(tensors["model.embed_tokens.weight"].read()[input_ids])
    hidden_states = []
    for layer in range(config.num_hidden_layers):
        hidden_states.append(h.numpy())
        prefix = f"model.layers.{layer}."
        weights = {
            name.removeprefix(prefix).removesuffix(".weight"): to_tensor(tensor.read())
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        h = _run_layer(config, weights, h)
        del weights  # before the next layer's are read
    h = _norm(config, h, to_tensor(tensors["model.norm.weight"].read()))
    hidden_states.append(h.numpy())
    head = tensors["lm_head.weight"].read()
    logits = torch.empty((*h.shape[:2], config.vocab_size))
    for start in range(0, config.vocab_size, _HEAD_ROWS):
        rows = to_tensor(head[start : start + _HEAD_ROWS])
        if config.normalize_head:
            rows = functional.normalize(rows)
        logits[..., start : start + _HEAD_ROWS] = functional.linear(h, rows)
    return Outputs(logits.numpy(), np.stack(hidden_states))


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """An fp32 copy; bfloat16 is passed as bits, because PyTorch does not know numpy's dtype."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(array.astype(np.float32))


def _run_layer(config: ModelConfig, weights: Mapping[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    h = h + _attention(config, weights, _norm(config, h, weights["input_layernorm"]))
    x = _norm(config, h, weights["post_attention_layernorm"])
    gate, up = (functional.linear(x, weights[f"mlp.{name}_proj"]) for name in ("gate", "up"))
    return h + functional.linear(functional.silu(gate) * up, weights["mlp.down_proj"])


def _norm(config: ModelConfig, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps))


def _attention(config: ModelConfig, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    batch, length, _ = x.shape
    # LLaMA's layout has W_pack in three parts.
    parts = ("W_pack",) if "self_attn.W_pack" in weights else ("q_proj", "k_proj", "v_proj")
    fused = torch.cat([functional.linear(x, weights[f"self_attn.{part}"]) for part in parts], -1)
    # [B, T, 3 N H] -> three of [B, N, T, H].
    q, k, v = fused.view(batch, length, 3, config.num_attention_heads, config.head_dim).permute(2, 0, 3, 1, 4)
    position = torch.arange(length, dtype=torch.float32)
    distance = position[None, :] - position[:, None]  # [T, T], key minus query
    if config.position_embedding == "rope":
        q, k = _rotate(config, q, position), _rotate(config, k, position)
        bias = torch.zeros(length, length)
    else:
        bias = _slopes(config.num_attention_heads)[:, None, None] * distance
    scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_dim) + bias.masked_fill(distance > 0, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, config.hidden_size)
    return functional.linear(mixed, weights["self_attn.o_proj"])


def _rotate(config: ModelConfig, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """RoPE as a product of complex numbers: components i and i + H / 2 are real and imaginary parts."""
    real, imaginary = x.chunk(2, -1)
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angle = position[:, None] * config.rope_theta**-exponent
    turned = torch.complex(real.contiguous(), imaginary.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def _slopes(heads: int) -> torch.Tensor:
    """[N]: 2^(-8 h / n), h = 1..n, for the largest power of two n <= N, then as many of 2^(-4 h / n) for odd h."""
    n = 1 << (heads.bit_length() - 1)
    exponents = [8 * h / n for h in range(1, n + 1)] + [4 * h / n for h in range(1, 2 * n, 2)][: heads - n]
    return torch.tensor([2.0**-e for e in exponents])
