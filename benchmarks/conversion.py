"""Time and memory of converting a full-size model in both directions, beside `cp` of the same files in the same run.

python benchmarks/conversion.py --size 7b --workdir DIR     # 31 GB of free space in DIR; 13b: 56 GB

Writes random bf16 weights in the released layout (pickled shards of up to 10 GB), copies them, converts them to an
Orbax checkpoint and back to safetensors, and compares the source, the checkpoint and the result (not with --no-diff).
Each step is its own process and starts with its input on disk only, not in the page cache; its peak memory is the
operating system's count (ru_maxrss, which includes resident pages of mapped files).
The files are removed at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONVERT = [sys.executable, str(Path(__file__).parents[1] / "tools" / "convert.py")]


def make(size: str, folder: Path) -> None:
    """Writes N(0, 0.02) weights in bf16, made layer by layer as they are read."""
    # Imported here: a child's peak memory counts from that of the process that starts it.
    import numpy as np

    from bc2_jax.config import BAICHUAN2_7B, BAICHUAN2_13B, ModelConfig
    from bc2_jax.convert import hf
    from bc2_jax.convert.hf_write import write_folder
    from bc2_jax.convert.source import Source
    from bc2_jax.convert.stream import Stream
    from bc2_jax.convert.table import param_shapes

    tiny = ModelConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, position_embedding="alibi",
        vocab_size=320,
    )  # fmt: skip
    one = dataclasses.replace(BAICHUAN2_7B, num_hidden_layers=4, vocab_size=32_000)  # 7B's tensors, fewer of them
    config = {"7b": BAICHUAN2_7B, "13b": BAICHUAN2_13B, "1b": one, "tiny": tiny}[size]
    shapes, bfloat16 = param_shapes(config), hf.DTYPES["bfloat16"]

    def read(path: str, layer: int | None) -> np.ndarray:
        shape = shapes[path] if layer is None else shapes[path][1:]
        generator = np.random.default_rng([sorted(shapes).index(path), 0 if layer is None else layer])
        array = np.empty(shape, bfloat16)
        for i in range(0, len(array), 4096):
            part = array[i : i + 4096]
            part[...] = np.float32(0.02) * generator.standard_normal(part.shape, dtype=np.float32)
        return array

    source = Source(Path("random"), config, dict.fromkeys(shapes, bfloat16), read, None)
    write_folder(Stream(source, bfloat16), folder, "bfloat16", file_format="bin", max_shard_bytes=10e9)


def forget(folder: Path) -> None:
    """Drops the files below `folder` from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(name: str, command: list[str], size: int, *inputs: Path) -> None:
    """Runs a command, prints its wall time, speed and peak memory."""
    for folder in inputs:
        forget(folder)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    last = output.strip().splitlines()[-1] if output.strip() else ""
    print(
        f"{name:10} {seconds:7.1f} s {size / seconds / 1e6:7.0f} MB/s  peak {usage.ru_maxrss / 2**20:6.2f} GiB  {last}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("7b", "13b", "1b", "tiny"), default="7b")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--no-diff", action="store_true", help="compare nothing")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.size, args.make)
        return
    root = args.workdir / f"conversion-{args.size}"
    source, copy, checkpoint, back = (root / name for name in ("released", "copy", "checkpoint", "back"))
    if not (source / "config.json").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        making = [sys.executable, __file__, "--size", args.size, "--workdir", str(args.workdir), "--make", str(source)]
        subprocess.run(making, check=True)
    size = sum(file.stat().st_size for file in source.iterdir())
    for old in (copy, checkpoint, back):
        shutil.rmtree(old, ignore_errors=True)
    copy_and_sync = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(copy)]
    measure("cp, sync", copy_and_sync, size, source)
    shutil.rmtree(copy)
    measure("to-orbax", [*CONVERT, "to-orbax", str(source), str(checkpoint)], size, source)
    if not args.no_diff:
        measure("diff", [*CONVERT, "diff", str(source), str(checkpoint)], size, source, checkpoint)
    if not args.keep:
        shutil.rmtree(source)  # to need room for two models, not for three
    measure("to-hf", [*CONVERT, "to-hf", str(checkpoint), str(back)], size, checkpoint)
    if not args.no_diff:
        measure("diff", [*CONVERT, "diff", str(checkpoint), str(back)], size, checkpoint, back)
    if not args.keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
