"""XLA compiler options per TPU generation, with the reason for each.

Runs and ahead-of-time compilation use the same `compiler_options(generation)`. The compiler refuses unknown names.
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
    reason: str  # why it is not at its default
    effect: str
    """Compile-time estimate of its effect on a step (`benchmarks/compiler_options.py`): "x 1.2 without" is the relative
    step time without this option alone."""


_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_LARGER_TILES = "larger matmul tiles"


def _no_windowed_einsum(effect: str) -> Option:
    return Option(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib", 1_000_000,
        "below a threshold a gathered matmul becomes a loop of permutes, three times slower at 32 chips", effect,
    )  # fmt: skip


# Collectives on the SparseCores leave the TensorCores to the matmuls and scatter gradients along several dimensions
# instead of all-reducing them. The fusion of collectives into matmuls must be off with them.
_SPARSE_CORE = (
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather", True, "weights are gathered beside the matmuls",
        "7B v6e 16x16, all SparseCore options together: x 1.24 without; 7B v5p 4x4x4, this alone: x 1.069",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather", True,
        "the same along two torus dimensions, which otherwise waits on the TensorCores",
        "7B v5p 4x4x4: x 1.066 without",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", True,
        "gradients are scattered beside the matmuls", "7B v5p 4x4x4: x 1.065 without",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter", True,
        "a scatter over a whole slice stays a scatter instead of an all-reduce of twice the bytes",
        "7B v5p 4x4x4: x 1.000 without",
    ),
    Option(
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce", True,
        "all-reduces run in the background",
        "7B v5p 4x4x4: x 1.000 without; with one axis of shards x 1.09",
    ),
    Option(
        "xla_tpu_enable_async_all_to_all", True, "all-to-alls of mesh.context overlap other work",
        "13B of 32k tokens, v5p 4x4x8, context 4: x 1.09 without",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion", False,
        "the compiler may not mix it with SparseCore collectives; newer libtpu refuses it on v5p and v6e",
        "none with libtpu 0.0.42 (7B v5p 4x4x4: x 1.000 without); for safety",
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", False, "as above, for gathers",
        "not tried alone; for safety",
    ),
)  # fmt: skip

_FUSED = "7B v5e 16x16, all of the fusion together: x 1.13 without"
_COLLECTIVE_FUSION = (
    Option(
        "xla_tpu_enable_async_collective_fusion", True, "v5e overlaps a collective by fusing it with matmuls", _FUSED
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", True, "the same for the gathers of weights", _FUSED
    ),
    Option(
        "xla_tpu_enable_async_collective_fusion_multiple_steps", True,
        "a collective may be spread over several matmuls", _FUSED,
    ),
    Option(
        "xla_tpu_overlap_compute_collective_tc", True, "the TensorCore computes while its collective is in flight",
        _FUSED,
    ),
    Option("xla_enable_async_all_gather", True, "a gather is split into a start and an end", _FUSED),
    Option(
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce", True,
        "v5e's all-reduces of gradients overlap the matmuls of the backward pass", _FUSED,
    ),
    Option("xla_enable_async_all_reduce", True, "an all-reduce is split into a start and an end", _FUSED),
)  # fmt: skip

OPTIONS: dict[str, tuple[Option, ...]] = {
    "v4": (
        Option(_VMEM, 32768, _LARGER_TILES, "not compared on v4; as for v5p, whose MXUs are the same"),
        _no_windowed_einsum("as for v5p"),
    ),
    "v5e": (
        Option(
            _VMEM, 32768, f"{_LARGER_TILES}; more is faster by the estimate, but its unrolled matmuls compile too long",
            "7B v5e 16x16: at 49152 step x 0.967, compilation x 1.3; at 65536 x 0.96, x 2",
        ),
        *_COLLECTIVE_FUSION,
        _no_windowed_einsum("as for v5p"),
    ),
    "v5p": (
        Option(
            _VMEM, 50_000, f"{_LARGER_TILES}; the default of Marin's runs on v5p",
            "7B v5p 4x4x4: x 1.230 without, from 32768; its single matmuls: x 1.00 to 1.02 with 32768",
        ),
        *_SPARSE_CORE,
        _no_windowed_einsum(
            "none on 64 chips (7B v5p 4x4x4); at 32 the matmuls of an earlier program took x 2.9 without"
        ),
    ),
    "v6e": (
        Option(
            _VMEM, 98304, f"{_LARGER_TILES}; the value of MaxText and Marin for dense models on v6e",
            "7B v6e 16x16, single matmuls: x 1.04 to 1.07 with 65536, x 1.2 to 1.5 without",
        ),
        *_SPARSE_CORE,
        _no_windowed_einsum("as for v5p"),
    ),
    "tpu7x": (_no_windowed_einsum("as for v5p"),),
}  # fmt: skip
"""Generation -> options, chosen by the compiler's cost model; to be verified on hardware."""

INFERENCE_OPTIONS = (
    Option(
        "xla_tpu_enable_dot_strength_reduction", False,
        "the matmuls of a single sequence stay matmuls instead of going to the vector unit",
        "13B v5e 2x4, decoding one sequence: the matmuls concerned x 3 without",
    ),
)  # fmt: skip
"""Additional options for prefill and decoding."""


def compiler_options(generation: str, overrides: tuple[str, ...] = (), *, inference: bool = False) -> dict[str, Value]:
    """For `lowered.compile(compiler_options=...)` of training or inference.

    `overrides`: "name=value", or "name=" to remove; later ones win. Raises ValueError for an unknown generation and
    malformed overrides.
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
