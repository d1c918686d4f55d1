"""How the CPU's compiler is told not to optimise: the training step of a tiny model takes 3 s instead of 14 s."""

from __future__ import annotations

import jax

# Newer versions have no other way to make fusions, and no such flag: an unknown one ends the process.
_CAN_CHOOSE_EMITTERS = jax.__version_info__ < (0, 11)
QUICK_COMPILE = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # The default, 32 parts, takes half as long again.
        "--xla_cpu_parallel_codegen_split_count=1",
        *["--xla_cpu_use_fusion_emitters=false"] * _CAN_CHOOSE_EMITTERS,
    ]
)
"""XLA_FLAGS, to be set before the first computation."""

OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **({"xla_cpu_use_fusion_emitters": True} if _CAN_CHOOSE_EMITTERS else {}),
}
"""Options of `jax.jit` for a program that is to be optimised all the same."""
