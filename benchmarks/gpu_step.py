"""Training step of a 1.3B model on one NVIDIA GPU: tokens/s and MFU, RoPE and ALiBi, beside PyTorch in the same run.

python benchmarks/gpu_step.py [--torch-python PYTHON] [--rows 4] [--heads 16] [--steps 10] [--turns 2] [--tiny]

It was run on the CPU path only (--tiny): none of its figures on a GPU is known yet.

Shape: hidden 2048, feed-forward 5504, 24 layers, 16 heads of 128, vocabulary 32768, rows of 4096 tokens of one
document, bf16 with fp32 master weights and moments, AdamW. Ours: attention by cuDNN, layers scanned, remat save_dots.
PyTorch: transformers' LLaMA of the same shape (RoPE) with torch.compile and gradient checkpointing, flash_attention_2
if the package flash-attn is installed, else sdpa; the output names which. Every program runs in a process of its own,
in turns, so that both see the same machine. ALiBi with heads of 128 needs compute capability 9.0; before, --heads 32.
Without a GPU it runs a tiny model on the CPU, with plain attention, and says so: no figure of that run means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L4": 121e12,
    "4090": 165e12,
}
"""Dense bf16 FLOP/s by a part of the device's name (NVIDIA's data sheets)."""


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """The model and its rows."""
    if args.tiny:
        return {"hidden": 64, "ffn": 176, "layers": 2, "heads": 2, "vocab": 512, "length": 64, "rows": 2}
    return {
        "hidden": 2048, "ffn": 5504, "layers": 24, "heads": args.heads, "vocab": 32_768, "length": 4096,
        "rows": args.rows,
    }  # fmt: skip


def run_ours(position: Any, shape: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    if args.tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    from bc2_jax.config import ComputeConfig, DataConfig, MeshConfig, ModelConfig, SourceConfig, TrainConfig
    from bc2_jax.data.batch import make_put
    from bc2_jax.hardware.timing import seconds_of_calls
    from bc2_jax.model.baichuan import init_params
    from bc2_jax.sharding import make_mesh
    from bc2_jax.train.job import init_state, lower_train_step
    from bc2_jax.train.pretrain import make_step
    from bc2_jax.train.start import check_attention

    device = jax.devices()[0]
    config = TrainConfig(
        name="gpu_step", num_steps=1, mesh=MeshConfig(fsdp=1),
        model=ModelConfig(
            hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"], vocab_size=shape["vocab"], position_embedding=position,
        ),
        data=DataConfig(
            sources=(SourceConfig(path="synthetic"),), tokenizer="none", sequence_length=shape["length"],
            global_batch_size=shape["rows"],
        ),
        compute=ComputeConfig(attention="chunked" if args.tiny else "flash", remat="save_dots"),
    )  # fmt: skip
    mesh = make_mesh(config.mesh, [device])
    check_attention(config, mesh)
    size = (shape["rows"], shape["length"])
    tokens = np.random.default_rng(0).integers(3, shape["vocab"], (size[0], size[1] + 1), dtype=np.int32)
    positions = np.tile(np.arange(size[1], dtype=np.int32), (size[0], 1))
    rows = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "positions": positions}
    rows["segment_ids"] = np.ones_like(positions)
    with jax.set_mesh(mesh):
        parts = make_step(config, mesh)
        state, batch = (
            init_state(init_params(config.model, 0, mesh), parts.optimizer),
            make_put(config.data, mesh)(rows),
        )
        step = lower_train_step(parts.objective, parts.optimizer, state, {}, batch, norms=False).compile()
        metrics: dict[str, Any] = {}

        def call() -> Any:
            nonlocal state, metrics
            state, metrics = step(state, {}, batch)
            return state

        seconds = seconds_of_calls(call, args.steps)
    return {
        "seconds": statistics.median(seconds), "device": device.device_kind, "flops": parts.flops_per_step,
        "loss": float(metrics["loss"]), "attention": config.compute.attention,
    }  # fmt: skip


def has_gpu() -> bool:
    """Whether NVIDIA's driver finds a GPU."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=2, help="times each program is run")
    parser.add_argument("--peak", type=float, help="dense bf16 FLOP/s of a GPU that is not known here")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--child", choices=("rope", "alibi"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_ours(args.child, shape_of(args), args)))
        return
    options = [argument for argument in sys.argv[1:] if argument != "--tiny"]
    if not args.tiny and not has_gpu():
        print("This machine has no NVIDIA GPU: a tiny model runs on the CPU, whose figures mean nothing.")
        args.tiny = True
    options += ["--tiny"] if args.tiny else []
    shape = shape_of(args)
    programs = {f"bc2_jax {name}": [sys.executable, __file__, *options, "--child", name] for name in ("rope", "alibi")}
    if not args.no_torch:
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gpu_step_torch.py")
        programs["PyTorch rope"] = [args.torch_python, beside, json.dumps(shape | {"steps": args.steps})]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(args.turns):
        for name, command in programs.items():
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    flops, tokens = results["bc2_jax rope"][0]["flops"], shape["rows"] * shape["length"]
    seconds = {name: statistics.median(turn["seconds"] for turn in turns) for name, turns in results.items()}
    for name, turns in results.items():
        device = turns[0]["device"]
        peak = args.peak or next((peak for part, peak in PEAKS.items() if part in device), None)
        mfu = "unknown peak" if peak is None else f"MFU {flops / seconds[name] / peak:.3f}"
        print(
            f"{name:14} {device}, {turns[0]['attention']}: {1e3 * seconds[name]:.1f} ms, {tokens / seconds[name]:,.0f} "
            f"tokens/s, {mfu}, loss {turns[0]['loss']:.3f}, turns {[round(1e3 * t['seconds'], 1) for t in turns]} ms"
        )
    for name in ("bc2_jax rope", "bc2_jax alibi") if not args.no_torch else ():
        print(f"{name} / PyTorch rope = {seconds[name] / seconds['PyTorch rope']:.2f} of its step time")


if __name__ == "__main__":
    main()
