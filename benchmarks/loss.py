"""What the loss costs in the 7B training step: ours, the naive one and one tiled over the tokens, with nothing run.

python benchmarks/loss.py [--topology v5p:4x4x4] [--batch-per-chip 4] [--remat full] [--fsdp-inner 4] [--json OUT]

Compiles the whole step (`bc2_jax.aot.compilation.compile_step`) once per loss, each in its own process, with

    ours    `bc2_jax.train.loss.head_loss`, once per --chunk
    naive   logits [B, T, V] of all tokens in fp32, the gradient by automatic differentiation
    tiled   a loop over 8 chunks of each sequence under `jax.checkpoint`, the idea behind MaxText's num_vocab_tiling:
            the backward pass computes a chunk's logits again. The loop closes over the stored weight, so it is
            cast and gathered, and its gradient reduced, chunk by chunk.

in place of `head_loss`. All three are the same function (tests/train/test_loss_benchmark.py). Needs
`pip install -e '.[tpu]'`; a column takes some minutes. What the comparison shows is in docs/tpu.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest import mock

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from bc2_jax.aot import compilation, report
from bc2_jax.aot.estimate import Estimate, Simulation
from bc2_jax.aot.program import Collective, Computation, Instruction, Program
from bc2_jax.config import BAICHUAN2_7B, ComputeConfig, DataConfig, MeshConfig, SourceConfig, TrainConfig
from bc2_jax.data.batch import IGNORED
from bc2_jax.sharding import gather, named_sharding, reshard
from bc2_jax.tpu.chips import GIB, parse_topology
from bc2_jax.tpu.options import compiler_options
from bc2_jax.tpu.rates import default_rates
from bc2_jax.train import pretrain
from bc2_jax.train.loss import LossSums, head_loss

NUM_TILES = 8
SCOPE = "head_loss"
"""In the name of every instruction that a loss makes."""

out = Console(highlight=False, soft_wrap=True)


def naive_loss(
    h_BTD: Array, rows_VD: Array, labels_BT: Array, z_loss_weight: float, chunk: int
) -> tuple[Array, LossSums]:
    """As `head_loss`, from the logits of all tokens; `chunk` is not used."""
    with jax.named_scope(SCOPE):
        sums = _sums(h_BTD, rows_VD, labels_BT)
        return sums.cross_entropy + z_loss_weight * sums.max_z, sums


def tiled_loss(
    h_BTD: Array, rows_VD: Array, labels_BT: Array, z_loss_weight: float, chunk: int
) -> tuple[Array, LossSums]:
    """As `head_loss`, NUM_TILES parts of each sequence one after the other; `chunk` is not used."""

    def cut(x: Array, *axes: str) -> Array:
        shape = (x.shape[0], NUM_TILES, x.shape[1] // NUM_TILES, *x.shape[2:])
        return jnp.reshape(x, shape, out_sharding=named_sharding(axes[0], None, *axes[1:])).swapaxes(0, 1)

    @jax.checkpoint
    def tile(sums: LossSums, inputs: tuple[Array, Array]) -> tuple[LossSums, None]:
        return sums.plus(_sums(inputs[0], rows_VD, inputs[1])), None

    with jax.named_scope(SCOPE):
        h_CBTD, labels_CBT = cut(h_BTD, "batch", "sequence", "hidden"), cut(labels_BT, "batch", "sequence")
        exact = jnp.promote_types(h_BTD.dtype, jnp.float32)
        zeros = LossSums.zeros(exact)
        sums, _ = jax.lax.scan(tile, zeros, (h_CBTD, labels_CBT))
        return sums.cross_entropy + z_loss_weight * sums.max_z, sums


def _sums(h_BTD: Array, rows_VD: Array, labels_BT: Array) -> LossSums:
    exact = jnp.promote_types(h_BTD.dtype, jnp.float32)
    rows_VD = gather(rows_VD.astype(h_BTD.dtype), "vocab", "embed")
    sharding = named_sharding("batch", "sequence", "vocab")
    logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, rows_VD, preferred_element_type=exact, out_sharding=sharding)
    ids_V = reshard(jnp.arange(rows_VD.shape[0]), "vocab")
    label_logit_BT = jnp.where(ids_V == labels_BT[..., None], logits_BTV, 0).sum(-1)
    max_BT = logits_BTV.max(-1)
    valid_BT = (labels_BT != IGNORED).astype(exact)
    columns = (
        jax.nn.logsumexp(logits_BTV, axis=-1) - label_logit_BT, max_BT**2, max_BT,
        (label_logit_BT == max_BT).astype(exact), jnp.ones_like(max_BT),
    )  # fmt: skip
    largest = jnp.max(jnp.where(valid_BT > 0, max_BT, -jnp.inf))
    return LossSums(*[*(jnp.sum(c * valid_BT) for c in columns), largest])


LOSSES = {"ours": head_loss, "naive": naive_loss, "tiled": tiled_loss}


class LossPart(Simulation):
    """The part of an estimate that the loss has: its compute and its collectives. Nothing of it counts as exposed."""

    def _compute(self, instruction: Instruction, computation: Computation, parts: Any) -> None:
        if SCOPE in instruction.op_name:
            super()._compute(instruction, computation, parts)

    def _count(self, collective: Collective, seconds: float, asynchronous: bool, times: int) -> None:
        if SCOPE in collective.op_name:
            super()._count(collective, seconds, asynchronous, times)


def traffic(estimate: Estimate) -> tuple[int, int]:
    """Bytes of the whole tensors that are gathered and reduced, of one device."""
    kinds = estimate.collectives
    gathers = sum(t.gather_bytes for t in kinds.values())
    gathered = sum(t.bytes for kind, t in kinds.items() if kind == "all-gather") + gathers
    return gathered, sum(t.bytes for kind, t in kinds.items() if "reduce" in kind) - gathers


def make_config(args: argparse.Namespace, chunk: int) -> TrainConfig:
    topology = parse_topology(args.topology)
    return TrainConfig(
        name="baichuan2_7b",
        model=BAICHUAN2_7B,
        data=DataConfig(
            sources=(SourceConfig(path="none"),), tokenizer="none",
            global_batch_size=args.batch_per_chip * topology.num_chips,
        ),
        compute=ComputeConfig(attention="flash", remat=args.remat, loss_chunk=chunk),
        mesh=MeshConfig(fsdp_inner=args.fsdp_inner),
        num_steps=1,
    )  # fmt: skip


def measure(args: argparse.Namespace, loss: str, chunk: int) -> dict[str, Any]:
    """The step's report with the loss's own part under "loss"; {"error": message} where it does not fit."""
    compilation.use_topologies()
    topology = parse_topology(args.topology)
    try:
        with mock.patch.object(pretrain, "head_loss", LOSSES[loss]):
            compiled = compilation.compile_step(
                make_config(args, chunk), topology, compiler_options(topology.chip.name)
            )
    except compilation.DoesNotFit as error:
        return {"error": str(error)}
    rates = default_rates(topology.chip)
    part = LossPart(Program(compiled.hlo), topology, compiled.coordinates, rates).estimate
    gathered, reduced = traffic(part)
    figures = {
        "matmul": part.matmul, "vector": part.vector, "vector_raw": part.vector_raw, "gathered_bytes": gathered,
        "reduced_bytes": reduced, "collectives": {kind: dataclasses.asdict(t) for kind, t in part.collectives.items()},
    }  # fmt: skip
    return report.make_report(compiled).as_json() | {"loss": figures}


def cells(r: dict[str, Any]) -> dict[str, str]:
    """One column of the table."""
    parts, loss = r["estimated_step_parts"], r["loss"]
    return {
        "HBM, sum": f"{r['hbm_bytes_per_chip'] / GIB:.2f} GiB",
        "HBM, in use at one time": f"{r['hbm']['peak'] / GIB:.2f} GiB",
        "step": f"{r['estimated_step_seconds']:.3f} s",
        **{f"  {name}": f"{parts[name]:.3f} s" for name in ("matmul", "vector", "kernels", "exposed")},
        "MFU (at worst)": f"{r['estimated_mfu']:.3f} ({r['estimated_mfu_low']:.3f})",
        "the loss: matmul": f"{loss['matmul']:.4f} s",
        "the loss: vector": f"{loss['vector']:.4f} s",
        "head gathered": f"{loss['gathered_bytes'] / GIB:.2f} GiB",
        "head reduced": f"{loss['reduced_bytes'] / GIB:.2f} GiB",
        "compilation": f"{r['compile_seconds']:.0f} s",
    }


def show(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    batch = f"{args.batch_per_chip} sequences a chip, remat {args.remat}"
    table = Table("", title=f"7B on {args.topology}, {batch}: compile-time estimate, nothing was run")
    columns = []
    for name, result in results.items():
        if "error" in result:
            out.print(f"{name}: {result['error']}", markup=False)
            continue
        table.add_column(name, justify="right")
        columns.append(cells(result))
    for label in columns[0] if columns else ():
        table.add_row(label, *(column[label] for column in columns))
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--batch-per-chip", type=int, default=4, help="sequences of 4096 tokens")
    parser.add_argument("--remat", choices=get_args(get_type_hints(ComputeConfig)["remat"]), default="full")
    parser.add_argument("--fsdp-inner", type=int, default=4)
    parser.add_argument("--losses", choices=tuple(LOSSES), nargs="+", default=tuple(LOSSES))
    parser.add_argument(
        "--chunk", type=int, nargs="+", default=(ComputeConfig().loss_chunk,),
        help="compute.loss_chunk of ours, one column each",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    lines = [(loss, chunk) for loss in args.losses for chunk in (args.chunk if loss == "ours" else args.chunk[:1])]
    results = {}
    for loss, chunk in lines:
        name = f"{loss}, chunks of {chunk}" if loss == "ours" else loss
        # A compile holds gigabytes and may die.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
            results[name] = process.submit(measure, args, loss, chunk).result()
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(args, results)


if __name__ == "__main__":
    main()
