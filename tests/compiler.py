"""How the CPU's compiler is told not to optimise: the training step of a tiny model takes 3 s instead of 14 s."""

from __future__ import annotations

QUICK_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
"""XLA_FLAGS, to be set before the first computation. One part to compile: 32, the default, take half as long again."""

OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
"""Options of `jax.jit` for a program that is to be optimised all the same."""
