"""What a layer keeps for the backward pass, by the names that attention and feed-forward give (`checkpoint_name`)."""

from __future__ import annotations

import jax

from bc2_jax.config import ComputeConfig
from bc2_jax.kernels.cudnn import PRIMITIVE

ATTENTION = ("attention", "attention_lse")
PROJECTIONS = ("q", "k", "v", *ATTENTION, "o")
MATMULS = (*PROJECTIONS, "gate", "up", "down")


def _keep(names: tuple[str, ...]):
    """The remat policy that keeps the values of these names, and cuDNN's attention, whose log-sum-exp has no name."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(
        policies.save_only_these_names(*names), lambda primitive, *_, **__: primitive.name.startswith(PRIMITIVE)
    )  # fmt: skip


def remat(function, compute: ComputeConfig):
    """`function` with intermediate values kept or recomputed according to `compute.remat`."""
    policies = jax.checkpoint_policies
    match compute.remat:
        case "none":
            return function
        case "full":
            policy = policies.nothing_saveable
        case "save_dots":
            policy = _keep(MATMULS)
        case "save_projections":
            policy = _keep(PROJECTIONS)
        case "save_attention":
            policy = _keep(ATTENTION)
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[], names_which_can_be_offloaded=list(MATMULS),
                offload_src="device", offload_dst="pinned_host",
            )  # fmt: skip
    return jax.checkpoint(function, policy=policy, prevent_cse=not compute.scan_layers)
