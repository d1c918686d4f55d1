"""Median time of a training step on one CPU device, beside PyTorch eager and torch.compile in the same run.

python benchmarks/cpu_step.py [--dtype float32 bfloat16] [--steps 8] [--torch-python PYTHON] [--neighbour]

Shape: hidden 512, 8 heads, 8 layers, feed-forward 1376, vocabulary 16384, batch 4 x 512 synthetic tokens, AdamW, no
rematerialisation (ours: --remat), layers unrolled as in configs/demo.py (ours: --scan-layers). The programs alternate,
one process each time, so that all see the same load of the machine. Our first process compiles; the later ones use the
compilation cache. --torch-python is a Python with torch installed (by default this one, if it has torch). --neighbour
repeats everything beside a process that copies arrays larger than the caches without pause, which takes memory
bandwidth and a part of one core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

START = time.perf_counter()
ROWS, LENGTH = 4, 512
SHAPE: Any = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
    "vocab_size": 16384,
}  # fmt: skip
NEIGHBOUR = "import numpy\na, b = numpy.zeros((2, 2**25))\nwhile True: a[:], b[:] = b, a"
"""Copies 256 MiB after 256 MiB."""


def run_ours(dtype: Any, steps: int, args: argparse.Namespace) -> dict[str, float]:
    from bc2_jax.cpu import keep_heap

    if not args.no_keep_heap:
        keep_heap()
    import jax
    import numpy as np

    from bc2_jax.config import ComputeConfig, DataConfig, MeshConfig, ModelConfig, SourceConfig, TrainConfig
    from bc2_jax.data.batch import make_put
    from bc2_jax.model.baichuan import init_params
    from bc2_jax.sharding import make_mesh
    from bc2_jax.train.job import init_state, lower_train_step
    from bc2_jax.train.optimizer import make_optimizer
    from bc2_jax.train.pretrain import make_objective
    from bc2_jax.train.start import use_compilation_cache

    config = TrainConfig(
        name="cpu_step",
        model=ModelConfig(**SHAPE, position_embedding=args.position_embedding),
        data=DataConfig(
            sources=(SourceConfig(path="synthetic"),), tokenizer="none", sequence_length=LENGTH, global_batch_size=ROWS
        ),
        compute=ComputeConfig(
            dtype=dtype, remat=args.remat, scan_layers=args.scan_layers, attention=args.attention,
            attention_block=args.attention_block, loss_chunk=args.loss_chunk,
        ),
        mesh=MeshConfig(num_cpu_devices=1),
        num_steps=steps,
    )  # fmt: skip
    use_compilation_cache(args.compilation_cache)
    mesh = make_mesh(config.mesh)
    tokens = np.random.default_rng(0).integers(3, 16384, (ROWS, LENGTH + 1), dtype=np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    rows = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "positions": positions}
    rows["segment_ids"] = np.ones_like(positions)
    with jax.set_mesh(mesh):
        objective, optimizer = make_objective(config.model, config.compute), make_optimizer(config.optimizer)
        state = init_state(init_params(config.model, 0, mesh), optimizer)
        batch = make_put(config.data, mesh)(rows)
        step = lower_train_step(objective, optimizer, state, {}, batch).compile()
        seconds, cpu_seconds = [], []
        for index in range(steps + 1):
            begin, cpu = time.perf_counter(), time.process_time()
            state, metrics = step(state, {}, batch)
            jax.block_until_ready(state)
            if index == 0:
                first = time.perf_counter() - START
            else:
                seconds.append(time.perf_counter() - begin)
                cpu_seconds.append(time.process_time() - cpu)
    return {
        "median": statistics.median(seconds), "min": min(seconds), "cpu": statistics.median(cpu_seconds),
        "start_to_first_step": first, "loss": float(metrics["loss"]),
        "temporary_gib": getattr(step.memory_analysis(), "temp_size_in_bytes", 0) / 2**30,
        "accessed_gib": (step.cost_analysis() or {}).get("bytes accessed", 0) / 2**30,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2, help="times each program is run")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--neighbour", action="store_true", help="repeat beside a memory-bound process")
    parser.add_argument("--no-keep-heap", action="store_true")
    parser.add_argument("--scan-layers", action="store_true", help="a slower step for a faster start")
    parser.add_argument("--remat", choices=("none", "save_dots"), default="none")
    parser.add_argument("--position-embedding", choices=("rope", "alibi"), default="rope")
    parser.add_argument("--attention", choices=("reference", "chunked"), default="chunked")
    parser.add_argument("--attention-block", type=int, default=128)
    parser.add_argument("--loss-chunk", type=int, default=2048)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compilation-cache", default="", help="default: a new folder for each dtype")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_ours(args.dtype[0], args.steps, args)))
        return
    for loaded in (False, True) if args.neighbour else (False,):
        with neighbour() if loaded else contextlib.nullcontext():
            print(f"{'beside a neighbour' if loaded else 'alone'}: {machine()}", flush=True)
            for dtype in args.dtype:
                compare(dtype, args, "beside a neighbour" if loaded else "alone")


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """A process that is bound by memory bandwidth."""
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        yield
    finally:
        process.kill()


def machine() -> str:
    """How fast this machine is now: a step is bound by arithmetic, memory bandwidth or both."""
    import numpy as np

    from bc2_jax.config import ModelConfig

    x, source, target = np.ones((2048, 2048), np.float32), *np.ones((2, 2**25))

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return min(times)

    flops, moved = 2 * len(x) ** 3, source.nbytes + target.nbytes
    matmul, copy = seconds(lambda: x @ x), seconds(lambda: np.copyto(target, source))
    rate = flops / matmul
    step = ROWS * ModelConfig(**SHAPE, position_embedding="rope").flops_per_sequence(LENGTH) / rate
    return (
        f"fp32 matmul of numpy {rate / 1e9:.0f} GFLOP/s (the model FLOPs of a step take {step:.2f} s at that rate), "
        f"copy {moved / copy / 1e9:.1f} GB/s on one core"
    )


def compare(dtype: str, args: argparse.Namespace, label: str) -> None:
    """Runs the programs in turn and prints their medians and ratios."""
    torch_step = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cpu_step_torch.py")
    with tempfile.TemporaryDirectory() as cache:
        ours = [sys.executable, __file__, "--compilation-cache", cache, *sys.argv[1:], "--child", "--dtype", dtype]
        programs = {"bc2_jax": ours}
        if not args.no_torch:
            programs["PyTorch eager"] = [args.torch_python, torch_step, dtype, str(args.steps)]
            programs["torch.compile"] = [*programs["PyTorch eager"], "compile"]
        results: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
        for _ in range(args.turns):
            for name, command in programs.items():
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {}
    for name, turns in results.items():
        means = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        medians[name] = means["median"]
        print(f"{dtype}, {label}, {name}:", ", ".join(f"{k} {v:.3f}" for k, v in means.items()), flush=True)
    starts = (f"{turn['start_to_first_step']:.1f} s" for turn in results["bc2_jax"])
    print(f"{dtype}, {label}, process start to first finished step, turn by turn:", *starts, flush=True)
    for name in [name for name in medians if name != "bc2_jax"]:
        print(f"{dtype}, {label}, bc2_jax / {name} = {medians['bc2_jax'] / medians[name]:.2f}", flush=True)


if __name__ == "__main__":
    main()
