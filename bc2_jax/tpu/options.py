"""XLA compiler options per generation, as data with the reason for each; passed through `compiler_options`.

What was compiled here is what should run: `compiler_options(chip)` is also what a run on hardware should pass. The
compiler refuses a name it does not know ("No such compile option"), so a typo cannot go unnoticed.
"""

from __future__ import annotations

import dataclasses

from bc2_jax.tpu.chips import CHIPS

Value = bool | int | str


@dataclasses.dataclass(frozen=True)
class Option:
    """One compiler option."""

    name: str
    value: Value
    reason: str
    """Why it is not left at its default, one line."""


def _vmem(kib: int, reason: str) -> Option:
    return Option("xla_tpu_scoped_vmem_limit_kib", kib, reason)


_NO_WINDOWED_EINSUM = Option(
    "xla_jf_spmd_threshold_for_windowed_einsum_mib", 1_000_000,
    "below a threshold a gathered matmul becomes a loop of permutes, three times its time at 32 chips",
)  # fmt: skip

# Collectives on the SparseCores leave the TensorCores to the matmuls, and scatter gradients along several dimensions
# where the TensorCore's path would reduce them whole. The fusion of collectives into matmuls must be off beside them.
_SPARSE_CORE = (
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather", True, "weights are gathered beside the matmuls"
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
        True,
        "the same along two torus dimensions, which otherwise waits on the TensorCores",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather", True,
        "the same along all three torus dimensions at once",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", True,
        "gradients are scattered beside the matmuls",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter", True,
        "a scatter over a whole slice stays a scatter instead of an all-reduce of twice the bytes",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce", True,
        "what must be reduced whole is so in the background",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion", False,
        "the compiler may not mix it with SparseCore collectives; newer libtpu refuses it on v5p and v6e",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", False, "as above, for gathers"
    ),
)  # fmt: skip

_COLLECTIVE_FUSION = (
    Option("xla_tpu_enable_async_collective_fusion", True, "v5e overlaps a collective by fusing it with matmuls"),
    Option("xla_tpu_enable_async_collective_fusion_fuse_all_gather", True, "the same for the gathers of weights"),
    Option(
        "xla_tpu_enable_async_collective_fusion_multiple_steps", True,
        "a collective may be spread over several matmuls",
    ),
    Option("xla_tpu_overlap_compute_collective_tc", True, "the TensorCore computes while its collective is in flight"),
    Option("xla_enable_async_all_gather", True, "a gather is split into a start and an end"),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce", True,
        "gradients, which v5e reduces whole, are so beside the matmuls of the backward pass",
    ),
    Option("xla_enable_async_all_reduce", True, "an all-reduce is split into a start and an end"),
)  # fmt: skip

OPTIONS: dict[str, tuple[Option, ...]] = {
    "v4": (_vmem(32768, "larger matmul tiles"), _NO_WINDOWED_EINSUM),
    "v5e": (
        _vmem(65536, "larger matmul tiles: half of the 128 MiB, the rest prefetches"),
        *_COLLECTIVE_FUSION,
        _NO_WINDOWED_EINSUM,
    ),
    "v5p": (
        _vmem(32768, "larger matmul tiles; 65536 is 2 % faster still by the estimate, for twice the compile time"),
        *_SPARSE_CORE,
        _NO_WINDOWED_EINSUM,
    ),
    "v6e": (_vmem(65536, "larger matmul tiles: half of the 128 MiB, the rest prefetches"), _NO_WINDOWED_EINSUM),
    "tpu7x": (_NO_WINDOWED_EINSUM,),
}
"""Generation -> options. All are a prediction of the compiler's cost model, to be verified on hardware."""

INFERENCE_OPTIONS = (
    Option(
        "xla_tpu_enable_dot_strength_reduction", False,
        "the matmuls of a single sequence stay matmuls; on the vector unit they take three times as long",
    ),
)  # fmt: skip
"""On top of the generation's, for prefill and decoding."""


def compiler_options(generation: str, overrides: tuple[str, ...] = (), *, inference: bool = False) -> dict[str, Value]:
    """For `lowered.compile(compiler_options=...)`, of training or of inference.

    `overrides` are "name=value", later ones win, "name=" removes.
    Raises ValueError for an unknown generation or an override of another form.
    """
    if generation not in OPTIONS:
        raise ValueError(f"generation = {generation!r} is not valid: it must be one of {', '.join(CHIPS)}.")
    options: dict[str, Value] = {
        option.name: option.value for option in OPTIONS[generation] + (INFERENCE_OPTIONS if inference else ())
    }  # fmt: skip
    for text in overrides:
        name, equals, value = text.partition("=")
        if not (name.replace("_", "").isalnum() and equals):
            raise ValueError(
                f"xla option {text!r} is not valid: write name=value, or name= to leave it at its default."
            )
        options.pop(name, None)
        if value:
            options[name] = {"true": True, "false": False}.get(
                value.lower(), int(value) if value.isdecimal() else value
            )
    return options
