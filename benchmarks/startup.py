"""Seconds by phase from the start of the program to the first step of a resumed run, on one device and on a mesh.

python benchmarks/startup.py --workdir DIR [--hidden 512] [--devices 1 8]     # 1024: 6 GB of space in DIR

The model has 7B's structure (32 layers, RoPE, NormHead, vocabulary 32,000) with a smaller hidden size. A first process
trains one step and saves it. Each later one resumes and ends after its first step: with an empty and then with a filled
compilation cache, with the restore beside the compilation ("beside", as it is) and before it ("serial").
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

VOCABULARY, LENGTH = 32_000, 128


class Serial:
    """Stands in for the loop's pool of one thread: the work is done before `submit` returns."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work())
        return future


def resume(typed: list[str], serial: bool) -> None:
    """Runs bc2 train until the end of the first step and prints the seconds by phase."""
    from bc2_jax.cli import train  # its clock starts here
    from bc2_jax.train import loop, startup
    from bc2_jax.train.goodput import Goodput

    def end(clock: startup.StartUp, say: Callable[[str], None], goodput: Goodput) -> None:
        report(clock, lambda text: None, goodput)
        print(json.dumps(clock.seconds), flush=True)
        os._exit(0)  # without saving, so that the next one starts from the same checkpoint

    report = startup.StartUp.end
    pool = Serial if serial else loop.ThreadPoolExecutor
    with mock.patch.object(startup.StartUp, "end", end), mock.patch.object(loop, "ThreadPoolExecutor", pool):
        train.main(typed)


def prepare(folder: Path, hidden: int) -> Path:
    """Random words as rows, a tokenizer, and the config of the run."""
    tools = Path(__file__).parents[1] / "tools"
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(4000)]
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": " ".join(generator.choices(words, k=400))}) for _ in range(300)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    text, tokenizer, rows = (str(folder / name) for name in ("text.jsonl", "tokenizer.model", "rows"))
    for tool, *arguments in (
        ("train_tokenizer.py", "--vocab-size", "1000", "--out", tokenizer, text),
        ("tokenize_corpus.py", "--tokenizer", tokenizer, "--sequence-length", str(LENGTH), "--out", rows, text),
    ):  # fmt: skip
        subprocess.run([sys.executable, str(tools / tool), *arguments], check=True, stdout=subprocess.DEVNULL)
    config = folder / "config.py"
    config.write_text(
        "from bc2_jax.config import *\n"
        f"def config(): return TrainConfig(name='startup', model=ModelConfig(hidden_size={hidden}, intermediate_size="
        f"{hidden * 43 // 16}, num_hidden_layers=32, num_attention_heads=32, position_embedding='rope', vocab_size="
        f"{VOCABULARY}), data=DataConfig(sources=(SourceConfig(path={rows!r}),), tokenizer="
        f"{tokenizer!r}, sequence_length={LENGTH}, global_batch_size=8), num_steps=1, eval_every=1000)\n"
    )
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--child", choices=("beside", "serial"), help=argparse.SUPPRESS)
    args, typed = parser.parse_known_args()
    if args.child:
        resume([*typed, "--workdir", str(args.workdir)], args.child == "serial")
        return
    root = args.workdir / f"startup-{args.hidden}"
    shutil.rmtree(root, ignore_errors=True)
    run = [str(prepare(root, args.hidden)), "--workdir", str(root / "run")]
    train = [sys.executable, str(Path(__file__).parents[1] / "train.py")]
    first = [*train, *run, "--mesh.num-cpu-devices", "1", "--compilation-cache", ""]
    subprocess.run(first, check=True, stdout=subprocess.DEVNULL)
    columns: dict[str, dict[str, float]] = {}
    for devices in args.devices:
        for order in ("serial", "beside"):
            cache = root / f"cache-{devices}-{order}"
            for state in ("empty", "filled"):
                child = [sys.executable, __file__, "--child", order, *run]
                options = ["--mesh.num-cpu-devices", str(devices), "--mesh.fsdp", str(devices), "--resume", "auto"]
                options += ["--num-steps", "100", "--compilation-cache", str(cache)]
                done = subprocess.run([*child, *options], stdout=subprocess.PIPE, text=True, check=True)
                columns[f"{devices} {order} {state}"] = seconds = json.loads(done.stdout.splitlines()[-1])
                phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
                print(f"{devices} devices, {order}, {state} cache: {phases}", flush=True)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    print("| devices, order, cache |", *(f"{name} |" for name in columns))
    print("|---" * (len(columns) + 1) + "|")
    for name in names:
        print(f"| {name} |", *(f"{column.get(name, 0.0):.1f} |" for column in columns.values()))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
