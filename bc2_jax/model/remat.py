"""What a layer keeps for the backward pass, by the names that attention and feed-forward give (`checkpoint_name`)."""

from __future__ import annotations

import jax

from bc2_jax.config import ComputeConfig
from bc2_jax.kernels.cudnn import PRIMITIVE


def remat(function, compute: ComputeConfig):
    """`function` with intermediate values kept or recomputed according to `compute.remat`."""
    if compute.remat == "none":
        return function
    policies = jax.checkpoint_policies
    names = list(compute.kept)
    if "attention" in names:
        names.append("attention_lse")
    if compute.remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src="device",
            offload_dst="pinned_host",
        )  # fmt: skip
    elif "attention" in names:
        # cuDNN's attention too, whose log-sum-exp has no name.
        policy = policies.save_from_both_policies(
            policies.save_only_these_names(*names), lambda primitive, *_, **__: primitive.name.startswith(PRIMITIVE)
        )
    else:
        policy = policies.save_only_these_names(*names)
    return jax.checkpoint(function, policy=policy, prevent_cse=not compute.scan_layers)
