"""The compile-time estimate beside published figures: Llama-shaped models, compiled as Baichuan 2 is, with nothing run.

python benchmarks/calibration.py [--shape llama2-70b-v5p ...] [--options published ours] [--json OUT]

Compiles this project's training step (`bc2_jax.aot.compilation.compile_step`) for a published model, slice, batch,
sequence length, remat policy and compiler options, once per line, and prints the estimate, the published MFU and their
ratio. These models have grouped-query attention, which Baichuan 2 has not: its classes are here, and repeat keys and
values before the kernel. Needs `pip install -e '.[tpu]'`; a line takes 5-25 CPU minutes. docs/tpu.md has what the
comparison shows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from rich.console import Console
from rich.table import Table

from bc2_jax.aot import compilation, report
from bc2_jax.config import ComputeConfig, DataConfig, MeshConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.kernels.attention import Tokens
from bc2_jax.model import baichuan
from bc2_jax.model import remat as remat_policies
from bc2_jax.model.attention import SelfAttention
from bc2_jax.model.layers import Linear
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.options import compiler_options

out = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQueryConfig(ModelConfig):
    """Llama: several query heads share a key and value head, and there is neither NormHead nor max-z loss."""

    num_key_value_heads: int
    position_embedding: Literal["rope", "alibi"] = "rope"
    normalize_head: bool = False
    z_loss_weight: float = 0.0

    def num_parameters(self) -> int:
        """Exact number of parameters: 68,976,648,192 for Llama 2 70B, 8,030,261,248 for Llama 3.1 8B."""
        spared = 2 * self.hidden_size * (self.num_attention_heads - self.num_key_value_heads) * self.head_dim
        return super().num_parameters() - self.num_hidden_layers * spared

    def full_square_flops(self, length: int) -> int:
        """Model FLOPs of one sequence where attention counts all pairs of tokens instead of the causal half."""
        later = 6 * self.num_hidden_layers * self.hidden_size * length * (length - 1)
        return self.flops_per_sequence(length) + later


class GroupedQueryAttention(SelfAttention):
    """Fewer key and value projections; the kernel, which is that of multi-head attention, gets them repeated."""

    def __init__(self, config: GroupedQueryConfig, compute: ComputeConfig, *, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs=rngs)
        shape = (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, config.head_dim)
        std = config.initializer_range
        self.k_proj, self.v_proj = (Linear.random("BTD,DNH->BTNH", shape, std, rngs=rngs) for _ in range(2))

    def _attend(self, q: Array, k: Array, v: Array, tokens: Tokens, rope: tuple[Array, Array] | None = None) -> Array:
        B, T, N, H = q.shape

        def repeat(x: Array, name: str) -> Array:
            K = x.shape[2]
            return jnp.broadcast_to(checkpoint_name(x, name)[:, :, :, None], (B, T, K, N // K, H)).reshape(q.shape)

        return super()._attend(q, repeat(k, "k_once"), repeat(v, "v_once"), tokens, rope)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A figure measured on hardware and the settings behind it."""

    model: GroupedQueryConfig
    num_parameters: int
    """As released."""
    topology: str
    length: int
    """Tokens of a sequence."""
    sequences: int
    """Per chip and step."""
    step_seconds: float
    saved: tuple[str, ...]
    """What its remat policy keeps of a layer in HBM, by our names; "input" is the layer's input, "k_once" and "v_once"
    are keys and values before they are repeated."""
    offloaded: tuple[str, ...]
    """What it keeps in host memory."""
    options: tuple[str, ...]
    """Its compiler options, as --xla; those that libtpu 0.0.42 does not know are left out."""


_FUSED_GATHERS = (
    "xla_tpu_enable_async_collective_fusion=true", "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true", "xla_tpu_overlap_compute_collective_tc=true",
    "xla_enable_async_all_gather=true",
)  # fmt: skip
_V5P = (
    *_FUSED_GATHERS, "xla_tpu_megacore_fusion_allow_ags=false", "xla_enable_async_collective_permute=true",
    "xla_tpu_enable_ag_backward_pipelining=true", "xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "xla_tpu_data_parallel_opt_different_sized_ops=true",
)  # fmt: skip
_SPARSE_CORE_REDUCTIONS = ("xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",)
_SCATTER_LAYOUT = (
    "xla_tpu_use_minor_sharding_for_major_trivial_input=true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1", "xla_tpu_assign_all_reduce_scatter_layout=true",
    "xla_tpu_enable_data_parallel_all_reduce_opt=true", "xla_tpu_data_parallel_opt_different_sized_ops=true",
)  # fmt: skip
_HOST_OFFLOAD = (
    "xla_tpu_enable_all_experimental_scheduler_features=true",
    "xla_tpu_enable_scheduler_memory_pressure_tracking=true", "xla_tpu_host_transfer_overlap_limit=24",
    "xla_tpu_aggressive_opt_barrier_removal=ENABLED", "xla_lhs_prioritize_async_depth_over_stall=ENABLED",
    "xla_tpu_enable_ag_backward_pipelining=true", "xla_should_allow_loop_variant_parameter_in_chain=ENABLED",
    "xla_should_add_loop_invariant_op_in_chain=ENABLED", "xla_max_concurrent_host_send_recv=100",
    "xla_tpu_scheduler_percent_shared_memory_limit=100", "xla_latency_hiding_scheduler_rerun=2",
)  # fmt: skip
_VMEM = ("xla_tpu_scoped_vmem_limit_kib=98304",)

_LLAMA2_70B = GroupedQueryConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=32_000,
)  # fmt: skip
_LLAMA31_70B = dataclasses.replace(_LLAMA2_70B, vocab_size=128_256, model_max_length=8192, rope_theta=500_000.0)
_LLAMA31_8B = dataclasses.replace(
    _LLAMA31_70B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
)

# https://maxtext.readthedocs.io/en/latest/reference/models/tiering.html has all four figures. The settings and step
# times are those of the recipes (https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/trillium, folders
# Llama2-70B-MaxText, Llama3.1-8B-MaxText/v6e-256 and Llama3.1-70B-MaxText/v6e-256) and, on v5p, of
# https://github.com/AI-Hypercomputer/maxtext/blob/92e59fdf/benchmarks/maxtext_v5p_model_configs.py#L156,
# with the compiler options of its MaxText/configs/v5p/llama2_70b.sh. The recipe of
# Llama 2 70B says 3 sequences a chip; its log line is that of 2 (2,097,152 tokens a step on 256 chips).
PUBLISHED = {
    "llama2-70b-v5p": Published(
        model=_LLAMA2_70B, num_parameters=68_976_648_192, topology="v5p:8x8x8", length=4096, sequences=4,
        step_seconds=24.29, saved=("input", "q", "k", "v", "o"), offloaded=(), options=_V5P,
    ),
    "llama31-8b-v6e": Published(
        model=_LLAMA31_8B, num_parameters=8_030_261_248, topology="v6e:16x16", length=8192, sequences=4,
        step_seconds=4.547, saved=(), offloaded=("input", "q", "k", "v", "o"),
        options=(*_VMEM, *_SCATTER_LAYOUT, *_FUSED_GATHERS, *_SPARSE_CORE_REDUCTIONS, *_HOST_OFFLOAD),
    ),
    "llama2-70b-v6e": Published(
        model=_LLAMA2_70B, num_parameters=68_976_648_192, topology="v6e:16x16", length=4096, sequences=2,
        step_seconds=9.052, saved=("input",), offloaded=("q", "k_once", "v_once"),
        options=(*_VMEM, *_FUSED_GATHERS, *_SPARSE_CORE_REDUCTIONS),
    ),
    "llama2-70b-v6e-full": Published(
        model=_LLAMA2_70B, num_parameters=68_976_648_192, topology="v6e:16x16", length=4096, sequences=4,
        step_seconds=17.373, saved=("input",), offloaded=(), options=(*_VMEM, *_FUSED_GATHERS),
    ),
    "llama31-70b-v6e": Published(
        model=_LLAMA31_70B, num_parameters=70_553_706_496, topology="v6e:16x16", length=8192, sequences=5,
        step_seconds=42.656, saved=(), offloaded=("input", "q", "k_once", "v_once"),
        options=(*_VMEM, *_SCATTER_LAYOUT, *_FUSED_GATHERS, *_HOST_OFFLOAD),
    ),
}  # fmt: skip


@contextlib.contextmanager
def model_of(published: Published) -> Iterator[None]:
    """Inside, the model has grouped-query attention, and a layer keeps what the published run kept."""

    def published_remat(run_layer: Callable[..., Any], compute: ComputeConfig) -> Callable[..., Any]:
        if compute.remat != "save_dots":
            return remat_policies.remat(run_layer, compute)
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(published.saved), names_which_can_be_offloaded=list(published.offloaded),
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip

        def with_named_input(h_BTD: Array, params: Any) -> Any:
            return run_layer(checkpoint_name(h_BTD, "input") if "input" in published.offloaded else h_BTD, params)

        return jax.checkpoint(with_named_input, policy=policy, prevent_cse=False)

    with (
        mock.patch.object(baichuan, "SelfAttention", GroupedQueryAttention),
        mock.patch.object(baichuan, "remat", published_remat),
    ):
        arrays = jax.tree.leaves(baichuan.split_model(published.model)[1])
        counts = sum(x.size for x in arrays), published.model.num_parameters(), published.num_parameters
        if len(set(counts)) != 1:
            raise AssertionError(f"parameters in arrays, by the formula and as released: {counts}")
        yield


def make_config(shape: str, data: int, remat: str) -> TrainConfig:
    """`remat`: ours is save_attention, the nearest of our policies that fits; published is what was published."""
    published = PUBLISHED[shape]
    return TrainConfig(
        name=shape,
        model=published.model,
        data=DataConfig(
            sources=(SourceConfig(path="none"),), tokenizer="none", sequence_length=published.length,
            global_batch_size=published.sequences * parse_topology(published.topology).num_chips,
        ),
        compute=ComputeConfig(attention="flash", remat="save_attention" if remat == "ours" else "save_dots"),
        mesh=MeshConfig(data=data),
        num_steps=1,
    )  # fmt: skip


def compile_published(
    shape: str, data: int, remat: str, options: str, xla: tuple[str, ...]
) -> compilation.CompiledStep:
    """`options`: ours, or the published compiler options; `xla` overrides some of them.

    Raises DoesNotFit where the chip's memory is too small.
    """
    published = PUBLISHED[shape]
    topology = parse_topology(published.topology)
    chosen = compiler_options(topology.chip.name, xla)
    if options == "published":
        # Without loops of permutes, which only our way of writing the matmuls would get.
        kept = tuple(f"{name}={value}" for name, value in chosen.items() if "windowed_einsum" in name)
        nothing = tuple(f"{name}=" for name in chosen)
        chosen = compiler_options(topology.chip.name, (*nothing, *kept, *published.options, *xla))
    with model_of(published):
        return compilation.compile_step(make_config(shape, data, remat), topology, chosen)


def compare(published: Published, result: report.Report) -> dict[str, float]:
    """MFU with attention counted in full, published and estimated, and the ratio of the step times."""
    scale = published.model.full_square_flops(published.length) / published.model.flops_per_sequence(published.length)
    measured = result.flops / published.step_seconds / result.peak_flops
    return {
        "published_step_seconds": published.step_seconds,
        "published_mfu_full_square": measured * scale,
        "estimated_mfu_full_square": result.mfu * scale,
        "estimated_mfu_low_full_square": result.mfu_low * scale,
        "estimated_mfu_high_full_square": result.mfu_high * scale,
        "ratio": result.mfu / measured,
        "ratio_low": result.mfu_low / measured,
        "ratio_high": result.mfu_high / measured,
    }


def show(title: str, result: report.Report, c: dict[str, float]) -> None:
    table = Table(title=f"{title}: compile-time estimate, nothing was run", show_header=False)
    for name, text in (
        *report.render(result),
        ("published step time", f"{c['published_step_seconds']:.3f} s"),
        (
            "MFU, all pairs counted",
            f"estimated {c['estimated_mfu_full_square']:.3f} (at worst {c['estimated_mfu_low_full_square']:.3f}, by "
            f"the compiler's cycles {c['estimated_mfu_high_full_square']:.3f}), published "
            f"{c['published_mfu_full_square']:.3f}",
        ),
        (
            "estimate / published",
            f"{c['ratio']:.2f} (at worst {c['ratio_low']:.2f}, by the compiler's cycles {c['ratio_high']:.2f})",
        ),
    ):
        table.add_row(name, text)
    out.print(table)
    for line in result.warnings:
        out.print(f"warning: {line}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(PUBLISHED), nargs="+", default=tuple(PUBLISHED))
    parser.add_argument("--data", type=int, nargs="+", default=(1,), help="mesh.data; 1 as published, 8 for the 70B")
    parser.add_argument("--remat", choices=("ours", "published"), nargs="+", default=("published",))
    parser.add_argument("--options", choices=("ours", "published"), nargs="+", default=("published",))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--xla", action="append", default=[], metavar="NAME=VALUE", help="a compiler option on top")
    args = parser.parse_args()
    compilation.use_topologies()
    figures = []
    for shape, data, remat, options in itertools.product(args.shape, args.data, args.remat, args.options):
        title = f"{shape} on {PUBLISHED[shape].topology}, mesh.data {data}, remat {remat}, compiler options {options}"
        try:
            result = report.make_report(compile_published(shape, data, remat, options, tuple(args.xla)))
        except compilation.DoesNotFit as error:
            out.print(f"{title}: {error}", markup=False)
            continue
        compared = compare(PUBLISHED[shape], result)
        show(title, result, compared)
        chosen = {"shape": shape, "data": data, "remat": remat, "options": options, "xla": args.xla}
        figures.append(chosen | compared | result.as_json())
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
