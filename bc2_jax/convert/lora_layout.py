"""Converts adapters between W_pack (released) and q_proj, k_proj, v_proj (LLaMA), exactly."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast, get_args

import numpy as np

from bc2_jax.config.lora import LoraConfig, LoraTarget
from bc2_jax.model.lora import SLOTS, Adapter, part_of

LoraLayout = Literal["baichuan2", "llama"]
LORA_LAYOUTS: tuple[LoraLayout, ...] = get_args(LoraLayout)
_PARTS = cast(tuple[LoraTarget, ...], SLOTS["W_pack"].weights)
_BLOCK = SLOTS["W_pack"].block


def to_layout(adapter: Adapter, layout: LoraLayout) -> Adapter:
    """The same weight change on the modules of `layout`, as fp32 numpy arrays.

    Raises ValueError for DoRA on only some of q_proj, k_proj and v_proj with layout "baichuan2": W_pack's magnitudes
    cover all three.
    """
    if layout == "llama":
        return _split(adapter) if "W_pack" in adapter.config.targets else adapter
    return _fuse(adapter) if set(_PARTS) & set(adapter.config.targets) else adapter


def _split(adapter: Adapter) -> Adapter:
    """Each of the three gets the same A."""
    config = adapter.config
    arrays = adapter.params["layers"][_BLOCK]["W_pack"]
    parts = {target: {k: np.ascontiguousarray(v) for k, v in part_of(arrays, "W_pack", target).items()}
             for target in _PARTS}  # fmt: skip
    rank, alpha = config.rank_of("W_pack"), _alpha_of(config, "W_pack")
    return _with_attention(adapter, {t: (rank, alpha) for t in _PARTS}, parts)


def _fuse(adapter: Adapter) -> Adapter:
    """Stacks the A matrices and puts the B matrices in blocks; the rank is the sum of the ranks."""
    config = adapter.config
    present = [t for t in _PARTS if t in config.targets]
    if config.dora and len(present) < len(_PARTS):
        missing = [t for t in _PARTS if t not in present]
        raise ValueError(
            f"layout = 'baichuan2' is not valid for DoRA on {', '.join(present)} without {', '.join(missing)}: it sets "
            "the lengths of all rows of W_pack; write it with the layout llama, or merge it into the model."
        )
    arrays = adapter.params["layers"][_BLOCK]
    rank, scaling = sum(config.rank_of(t) for t in present), config.scaling_of(present[0])
    first = np.asarray(arrays[present[0]]["lora_b"])
    lora_b = np.zeros((len(first), rank, len(_PARTS), *first.shape[2:]), np.float32)
    begin = 0
    for target in present:
        end = begin + config.rank_of(target)
        # W_pack has one scaling: use that of the first, and rescale the others.
        factor = np.float32(config.scaling_of(target) / scaling)
        lora_b[:, begin:end, _PARTS.index(target)] = np.asarray(arrays[target]["lora_b"]) * factor
        begin = end
    fused = {"lora_a": np.concatenate([np.asarray(arrays[t]["lora_a"]) for t in present], -1), "lora_b": lora_b}
    if config.dora:
        fused["magnitude"] = np.stack([np.asarray(arrays[t]["magnitude"]) for t in present], 1)
    alpha = scaling * (rank**0.5 if config.rslora else rank)
    return _with_attention(adapter, {"W_pack": (rank, alpha)}, {"W_pack": fused})


def _alpha_of(config: LoraConfig, target: LoraTarget) -> float:
    return config.alphas[config.targets.index(target)] if config.alphas else config.alpha


def _with_attention(
    adapter: Adapter, targets: dict[LoraTarget, tuple[int, float]], parts: dict[LoraTarget, dict[str, Any]]
) -> Adapter:
    """The adapter with these targets, {target: (rank, alpha)}, instead of those on queries, keys and values."""
    config, layers = adapter.config, adapter.params["layers"]
    others = [t for t in config.targets if t not in (*_PARTS, "W_pack")]
    settings = targets | {t: (config.rank_of(t), _alpha_of(config, t)) for t in others}
    ranks, alphas = (tuple(values) for values in zip(*settings.values(), strict=True))
    rank, alpha = (config.rank, config.alpha) if others else (ranks[0], alphas[0])
    new = dataclasses.replace(
        config, targets=tuple(settings), rank=rank, alpha=alpha,
        ranks=() if set(ranks) == {rank} else ranks, alphas=() if set(alphas) == {alpha} else alphas,
    )  # fmt: skip
    attention = {t: layers[_BLOCK][t] for t in others if SLOTS[t].block == _BLOCK}
    return Adapter(new, {"layers": layers | {_BLOCK: attention | parts}})
