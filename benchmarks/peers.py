"""MaxText's training step beside ours: the same shape, slice, batch, libtpu and estimate, with nothing run.

python benchmarks/peers.py --workdir DIR [--topology v5p:4x4x4] [--shape baichuan2-7b] [--options theirs]

Installs MaxText (the release whose requirements this libtpu and JAX meet) into DIR/env, unless --python names a Python
that has it, and compiles its step ahead of time with its own program (`train_compile`) and its own settings for the
chip. Our estimate reads the program that the compiler scheduled. Our step is that of docs/tpu/presets.json, with the
vocabulary of the shape. Writes docs/tpu/peers.json; benchmarks/tpu_tables.py shows it in docs/tpu.md.

Needs `pip install -e '.[tpu]'`, Python 3.12 for MaxText (--base-python) and 5-20 CPU minutes a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bc2_jax.aot import compilation
from bc2_jax.aot.estimate import estimate_step
from bc2_jax.aot.program import Program
from bc2_jax.aot.search import run_aot_compile
from bc2_jax.aot.tables import read_rows, write_rows
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.options import compiler_options

DOCS = Path(__file__).parents[1] / "docs" / "tpu"
PACKAGES = (
    "jax[tpu]==0.10.2", "libtpu==0.0.42.*", "flax==0.12.8", "optax", "chex", "aqtp", "grain", "orbax-checkpoint",
    "drjax", "omegaconf", "pydantic", "absl-py", "transformers", "sentencepiece", "ml-collections", "etils",
    "jaxtyping", "psutil", "pathwaysutils", "cloud-accelerator-diagnostics", "ml-goodput-measurement", "tensorboardX",
    "datasets", "tiktoken", "jinja2", "immutabledict", "xprof", "einshape", "typeguard==2.13.3", "pillow", "sympy",
)  # fmt: skip
WITHOUT_REQUIREMENTS = ("maxtext==0.2.4", "qwix==0.1.8", "tokamax==0.0.12")
"""Their extras ask for 150 packages more, which compiling a step does not import."""
SHAPES = {"baichuan2-7b": 125_696, "llama2-7b": 32_000}
"""Vocabulary; all else is that of Llama 2 7B, whose layers Baichuan 2 7B has."""
_FUSED = (
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
_DATA = "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"


@dataclasses.dataclass(frozen=True)
class Settings:
    """MaxText's for Llama 2 7B on one generation; all shard the parameters over the whole slice (fsdp)."""

    slice_name: str  # as Cloud TPU counts
    remat: str
    options: str


SETTINGS = {
    # configs/tpu/v5p/llama2_7b.sh and configs/tpu/v5e/llama2_7b.sh of its release
    "v5p:4x4x4": Settings(
        "v5p-128", "minimal",
        f"{_FUSED} {_DATA} --xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
        "--xla_tpu_enable_ag_backward_pipelining=true",
    ),
    "v5e:16x16": Settings("v5e-256", "save_qkv_proj", f"{_FUSED} {_DATA}"),
    # llama2_7b_4096 of benchmarks/maxtext_trillium_model_configs.py in its repository
    "v6e:16x16": Settings("v6e-256", "full", f"{_FUSED} --xla_tpu_scoped_vmem_limit_kib=98304"),
}  # fmt: skip


def install(workdir: Path, base_python: str) -> Path:
    """The Python of DIR/env, with MaxText installed."""
    python = workdir / "env" / "bin" / "python"
    if not python.exists():
        subprocess.run([base_python, "-m", "venv", str(workdir / "env")], check=True)
    for packages in (PACKAGES, ("--no-deps", *WITHOUT_REQUIREMENTS)):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def compile_peer(python: Path, folder: Path, topology: str, vocabulary: int, sequences: int, options: str) -> str:
    """Compiles MaxText's step and dumps it to `folder`. Returns what its program printed.

    Raises ValueError with its last line if it fails.
    """
    settings = SETTINGS[topology]
    # JAX takes the compiler's own options as true, but XLA's debugging options as True.
    flags = f"{options} --xla_dump_to={folder} --xla_dump_hlo_as_text=True"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier dump would be read instead
    folder.mkdir(parents=True)
    found = subprocess.run(
        [str(python), "-c", "import maxtext; print(maxtext.__path__[0])"], check=True, capture_output=True, text=True
    )
    command = [
        str(python), "-m", "maxtext.trainers.pre_train.train_compile",
        f"{found.stdout.split()[-1]}/configs/base.yml", "model_name=llama2-7b", "override_model_config=true",
        f"vocab_size={vocabulary}", f"compile_topology={settings.slice_name}", "compile_topology_num_slices=1",
        f"per_device_batch_size={sequences}", "max_target_length=4096", f"remat_policy={settings.remat}",
        "attention=flash", "ici_fsdp_parallelism=-1", "dataset_type=synthetic", "use_iota_embed=true",
        "enable_checkpointing=false", f"base_output_directory={folder}", "run_name=peer", f"compile_xla_flags={flags}",
    ]  # fmt: skip
    environment = os.environ | compilation.ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (folder / "log.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        last = done.stdout.strip().rpartition("\n")[2]
        raise ValueError(f"MaxText ended with {last!r}; {folder / 'log.txt'} has the rest")
    return done.stdout


SPLASH_BLOCK = 512  # MaxText's sa_block_q and so on
SPLASH_MATMULS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Of each visited pair of blocks; the backward passes compute the scores and their gradient again."""


def declare_attention(program: Program) -> None:
    """Gives splash attention's kernels, which declare no cost, the FLOPs of the blocks that they visit.

    The estimate then takes them at our kernel's share of peak, which is higher than theirs (docs/tpu.md).
    """
    for computation in program.computations.values():
        for kernel in computation.instructions:
            matmuls = next((n for name, n in SPLASH_MATMULS.items() if kernel.name.startswith(name)), 0)
            # [B, N, T, H], of one sequence [N, T, H]; fp32 results before it are of one block.
            result = next((shape.dims for shape in kernel.shapes if shape.dtype == "bf16"), None)
            if matmuls and kernel.opcode == "custom-call" and result:  # one without stays without a cost: `read_peer`
                *heads, T, H = result
                visited = (T + SPLASH_BLOCK) / (2 * T)
                flops = math.prod(heads) * matmuls * 2 * T * T * H * visited
                kernel.backend_config.setdefault("custom_call_config", {})["cost_estimate"] = {"flops": flops}


def read_peer(folder: Path, printed: str, topology: str) -> dict[str, Any]:
    """Our estimate of the dumped program. All its groups are whole slices, so that the devices' order is of no effect.

    Raises ValueError for a kernel without a declared cost, which would count as nothing.
    """
    parsed = parse_topology(topology)
    hlo, laid_out = compilation.read_dump(folder, "step of MaxText")
    places = [(0, *place) for place in itertools.product(*map(range, parsed.shape))]
    program = Program(hlo)
    declare_attention(program)
    e = estimate_step(program, parsed, places)
    if e.warnings:
        raise ValueError(f"{folder}: {e.warnings[0]}")
    sizes = {name: int(n) for name, n in re.findall(r"\b(\w+)_size_in_bytes=([0-9]+)", printed)}
    total = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return {
        "hbm_bytes_per_chip": total, "laid_out": laid_out, "estimated_step_seconds": e.seconds,
        "estimated_step_seconds_at_worst": e.seconds_high, "matmul": e.matmul, "vector": e.vector, "kernels": e.kernels,
        "exposed": e.exposed, "hidden": e.hidden,
    }  # fmt: skip


def our_arguments(topology: str, vocabulary: int) -> tuple[str, int]:
    """The arguments of tools/aot_compile.py for our preset, and its sequences a chip."""
    rows = read_rows(DOCS, "presets")
    arguments = next(
        row["arguments"] for row in rows
        if f"baichuan2_7b.py --topology {topology} " in row["arguments"] and "--num-slices" not in row["arguments"]
    )  # fmt: skip
    found = re.search(r"--data\.global-batch-size ([0-9]+)", arguments)
    assert found is not None, arguments
    return f"{arguments} --model.vocab-size {vocabulary}", int(found[1]) // parse_topology(topology).num_chips


def compare(args: argparse.Namespace, python: Path, topology: str, shape: str, options: str) -> dict[str, Any]:
    """One row of the table."""
    vocabulary, settings = SHAPES[shape], SETTINGS[topology]
    arguments, sequences = our_arguments(topology, vocabulary)
    flags = settings.options
    if options == "ours":
        chosen = compiler_options(parse_topology(topology).chip.name)
        flags = " ".join(f"--{name}={str(value).lower()}" for name, value in chosen.items())
    folder = args.workdir / f"{shape}_{topology.replace(':', '_')}_{options}"
    peer = read_peer(folder, compile_peer(python, folder, topology, vocabulary, sequences, flags), topology)
    ours = run_aot_compile(arguments.split())
    if "error" in ours:
        raise ValueError(ours["error"])
    return row(topology, shape, options, sequences, peer, ours)


def row(
    topology: str, shape: str, options: str, sequences: int, peer: dict[str, Any], ours: dict[str, Any]
) -> dict[str, Any]:
    """A row of docs/tpu/peers.json from the figures of both."""
    names = ("hbm_bytes_per_chip", "estimated_step_seconds", "estimated_step_seconds_at_worst", "estimated_mfu")
    return {
        "cells": [shape, f"{topology}, {sequences}", f"{SETTINGS[topology].remat}, {options}"],
        "figures": {
            "peer": peer,
            "ours": {name: ours[name] for name in names},
            "step_ratio": peer["estimated_step_seconds"] / ours["estimated_step_seconds"],
            "hbm_ratio": peer["hbm_bytes_per_chip"] / ours["hbm_bytes_per_chip"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="for the environment and the compiled programs")
    parser.add_argument("--python", type=Path, help="a Python that has MaxText")
    parser.add_argument("--base-python", default="python3.12", help="makes the environment")
    parser.add_argument("--topology", choices=tuple(SETTINGS), nargs="+", default=tuple(SETTINGS))
    parser.add_argument("--shape", choices=tuple(SHAPES), nargs="+", default=tuple(SHAPES))
    parser.add_argument(
        "--options", choices=("theirs", "ours"), nargs="+", default=("theirs",), help="MaxText's compiler options"
    )
    args = parser.parse_args()
    args.workdir = args.workdir.resolve()
    python = args.python or install(args.workdir, args.base_python)
    rows = {tuple(r["cells"]): r for r in (read_rows(DOCS, "peers") if (DOCS / "peers.json").exists() else [])}
    for shape, topology, options in itertools.product(args.shape, args.topology, args.options):
        try:
            found = compare(args, python, topology, shape, options)
        except ValueError as error:
            print(f"{shape}, {topology}, {options}: {error}", flush=True)
            continue
        rows[tuple(found["cells"])] = found
        write_rows(DOCS, "peers", list(rows.values()))
        print(f"{shape}, {topology}, {options}: MaxText / ours {found['figures']['step_ratio']:.2f} of the time, "
              f"{found['figures']['hbm_ratio']:.2f} of the HBM", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
