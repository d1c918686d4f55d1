"""Chooses the block sizes of the flash attention kernels for one chip, head size and length.

bc2 tune-attention --chip v5p --head-dim 128 --length 4096
bc2 tune-attention --chip v5p --head-dim 128 --length 4096 --run
bc2 tune-attention --chip v5p --rope --splash --blocks 1024

Needs the tpu extra, but without --run no TPU: each candidate is compiled for the chip in a process of its own, where
libtpu writes down how many cycles its schedule takes. With --run the best candidates are also timed, on the TPU that is
there. Prints the cycles of each candidate and the line for the table in bc2_jax/kernels/blocks.py. With --splash also
those of JAX's splash attention, which has no ALiBi, in the same blocks, and the best of both side by side.

libtpu counts only kernels without branches, so each process compiles one of them: a pair of blocks off the diagonal, or
one on it. For v4 and v5e it counts nothing; there the number is that of the instruction bundles, or of the cycles that
the matmuls take at the least, whichever is larger.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.terminal import program_words, use_utf8


class Chip(NamedTuple):
    topology: str
    cores: int
    """That share the heads of one device."""
    mxus: int
    """Of one core, each `mxu_size` squared multiplications a cycle."""
    mxu_size: int
    vmem_mib: int
    """For one kernel: what a core has, less room for the rest of the program."""
    span: int
    """Queries whose dq, 512 bytes each, leaves most of that memory free."""
    counted: bool
    """Whether libtpu counts cycles for it."""


CHIPS = {
    "v4": Chip("v4:2x2x1", 2, 4, 128, 14, 4096, False),
    "v5e": Chip("v5e:2x2", 1, 4, 128, 48, 32768, False),
    "v5p": Chip("v5p:2x2x1", 2, 4, 128, 32, 16384, True),
    "v6e": Chip("v6e:2x2", 1, 2, 256, 48, 32768, True),
}
KERNELS = ("flash_forward", "flash_backward")
SPLASH_KERNELS = ("splash_mha_fwd", "splash_mha_dkv")
MATMULS = (2, 5)
# Of the program that is compiled: enough steps that their start does not count.
BLOCKS, HEADS = 8, 2


@dataclasses.dataclass(frozen=True)
class Count:
    """Cycles that a grid step takes on one core, off the diagonal and on it."""

    block: int
    chunk: int
    plain: int
    diagonal: int


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, required=True)
    parser.add_argument("--head-dim", type=int, choices=(64, 128), default=128)
    parser.add_argument("--length", type=int, default=4096, metavar="T")
    parser.add_argument("--blocks", type=int, nargs="+", default=[512, 1024], metavar="N")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512, 1024], metavar="N")
    parser.add_argument("--rope", action="store_true", help="with RoPE instead of the ALiBi bias")
    parser.add_argument("--run", action="store_true", help="also time the best candidates on this machine's TPU")
    parser.add_argument("--splash", action="store_true", help="also count JAX's splash attention; implies --rope")
    parser.add_argument("--measure", type=int, nargs=4, help=argparse.SUPPRESS)  # kernel, block, ...
    return parser


def keep_one_body(wanted: Callable[[Callable], bool]) -> None:
    """Kernels that are traced from here on run only the branch that is wanted, without its condition."""
    from jax.experimental import pallas

    def when(condition):
        def decorate(body):
            if wanted(body):
                body()

        return decorate

    pallas.when = when


def place_on(chip: Chip) -> Callable[..., Any]:
    """Makes abstract arrays on one device of the chip: (*shape, dtype=float32)."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    device = topologies.get_topology_desc(chip.topology, platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return placed


def compile_kernel(args: argparse.Namespace, kernel: int, block: int, chunk: int, diagonal: bool) -> None:
    """In a process of its own: compiles one body of one kernel; libtpu writes to the folder it was started with."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bc2_jax.kernels.flash_backward import backward_span
    from bc2_jax.kernels.flash_forward import forward
    from bc2_jax.kernels.flash_tokens import Plan

    keep_one_body(lambda body: getattr(body, "keywords", None) == {"diagonal": diagonal, "mixed": False})
    chip = CHIPS[args.chip]
    placed = place_on(chip)
    T, steps = BLOCKS * block, BLOCKS * (BLOCKS + 1) // 2
    x, rows = placed(1, HEADS, T, args.head_dim, dtype=jnp.bfloat16), placed(1, BLOCKS, 2, block, dtype=jnp.int32)
    # In the order of each kernel's own steps.
    queries, keys = (index.astype(np.int32) for index in np.tril_indices(BLOCKS))
    if kernel == 1:
        keys, queries = (index.astype(np.int32) for index in np.triu_indices(BLOCKS))
    settings = {
        "chunk": chunk, "alibi": not args.rope, "scale": args.head_dim**-0.5, "vmem_bytes": chip.vmem_mib << 20,
        "interpret": False,
    }  # fmt: skip
    # The plan's integers are arguments: libtpu aborts when it counts some of the operations that would compute them.
    rope = (placed(1, BLOCKS, block, args.head_dim),) * 2 if args.rope and args.head_dim == 128 else ()
    tail = rows, placed(HEADS), placed(steps, dtype=jnp.int32), placed(BLOCKS, dtype=jnp.int32), rope

    def attend(q, k, v, rows, slopes, steps, anchors, rope):
        return forward(q, k, v, rows, slopes, Plan(queries, keys, steps, anchors), rope, **settings)

    def differentiate(q, k, v, d_out, stats, rows, slopes, steps, anchors, rope):
        return backward_span(
            q, k, v, d_out, stats, rows, slopes, Plan(queries, keys, steps, anchors), rope, start=0, stop=BLOCKS,
            dtype=None, diagonal_chunk=chunk, **settings,
        )  # fmt: skip

    if kernel == 0:
        jax.jit(attend).lower(x, x, x, *tail).compile()
    else:
        jax.jit(differentiate).lower(x, x, x, x, placed(1, HEADS, BLOCKS, 2, block), *tail).compile()


def compile_splash(args: argparse.Namespace, kernel: int, block: int, chunk: int) -> None:
    """The same for splash attention under a causal mask, which it applies to every block it visits.

    Its backward pass is one kernel, with the partial sums of dq in HBM, or two; this is the one.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    keep_one_body(lambda body: body.__name__ == "run")
    placed = place_on(CHIPS[args.chip])
    T = BLOCKS * block
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * HEADS)
    sizes = splash_attention_kernel.BlockSizes(block, block, chunk, block, block, chunk, use_fused_bwd_kernel=True)
    splash = splash_attention_kernel.make_splash_mha(
        mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, save_residuals=kernel == 0
    )
    x, row = placed(HEADS, T, args.head_dim, dtype=jnp.bfloat16), placed(HEADS, T)
    layout = splash_attention_kernel.QKVLayout.HEAD_DIM_MINOR

    def attend(splash, q, k, v):
        return splash(q, k, v)

    def differentiate(mask_info, q, k, v, lse, d_out, delta):
        return splash_attention_kernel._splash_attention_bwd_dkv(
            q, k, v, None, None, lse, d_out, delta, bq=block, bkv=block, bkv_compute=chunk, is_mqa=False,
            mask_info=mask_info, mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
            use_fused_bwd_kernel=True, q_layout=layout, k_layout=layout, v_layout=layout,
            mask_function=splash.kwargs["mask_function"], interpret=False,
        )  # fmt: skip

    def abstract(tree):
        return jax.tree.map(lambda leaf: placed(*leaf.shape, dtype=leaf.dtype), tree)

    if kernel == 0:
        jax.jit(attend).lower(abstract(splash), x, x, x).compile()
    else:
        jax.jit(differentiate).lower(abstract(splash.dkv_mask_info), x, x, x, row, x, row).compile()


def run_compiler(args: argparse.Namespace, body: tuple[int, int, int, bool], flags: str, splash: bool) -> None:
    """Raises RuntimeError with the compiler's own words if the candidate does not compile."""
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": flags,
    }
    command = [*program_words("tools/tune_attention.py"), "--chip", args.chip, "--head-dim", str(args.head_dim)]
    command += ["--measure", *(str(int(value)) for value in body), *(["--rope"] if args.rope else [])]
    command += ["--splash"] if splash else []
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "memory space" in line or "Error" in line]
        reason = re.sub(r".*(Ran out of memory)", r"\1", (lines or ["no reason given"])[-1])
        raise RuntimeError(reason.strip()[:120])


def count_cycles(
    args: argparse.Namespace, kernel: int, block: int, chunk: int, diagonal: bool, splash: bool = False
) -> int:
    """Cycles of a grid step on one core."""
    chip, body = CHIPS[args.chip], (kernel, block, chunk, diagonal)
    name = (SPLASH_KERNELS if splash else KERNELS)[kernel]
    with tempfile.TemporaryDirectory() as folder:
        if chip.counted:
            run_compiler(args, body, f"--xla_jf_dump_static_llo_profile_to={folder}", splash)
            # Splash walks the whole square, here without its test of what to skip; its backward pass is on one core.
            steps = BLOCKS**2 * HEADS if splash else BLOCKS * (BLOCKS + 1) // 2 * HEADS
            steps //= 1 if splash and kernel == 1 else chip.cores
            return find(folder, f"*{name}*", r"estimated_cycles: (\d+)") // steps
        dump = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        run_compiler(args, body, f"--xla_jf_dump_to={folder} {dump}", splash)
        bundles = find(folder, f"*{name}*-00-schedule*", r"total scheduled bundles: +(\d+)")
        work = (block + chunk) / (2 * block) if diagonal else 1.0  # on the diagonal a chunk stops at its last key
        return max(bundles, int(work * min_cycles(chip, args.head_dim, MATMULS[kernel] * block * block)))


def find(folder: str, pattern: str, expression: str) -> int:
    """The number in the one file of that name."""
    (path,) = Path(folder).glob(pattern)
    return int(re.findall(expression, path.read_text(encoding="utf-8", errors="replace"))[-1])


def min_cycles(chip: Chip, head_dim: int, products: int) -> int:
    """Cycles of matrix products of `products` entries along or over the head; a short head leaves a part idle."""
    return products * max(head_dim, chip.mxu_size) // (chip.mxus * chip.mxu_size**2)


def head_cycles(plain: Count, diagonal: Count, length: int) -> int:
    """Of one head: every pair of blocks once."""
    n = -(-length // plain.block)
    return n * (n - 1) // 2 * plain.plain + n * diagonal.diagonal


def time_candidate(args: argparse.Namespace, sizes, repeats: int = 20) -> float:
    """Milliseconds of forward and backward together, for 16 heads."""
    import jax
    import jax.numpy as jnp

    from bc2_jax.kernels.attention import Tokens
    from bc2_jax.kernels.flash import flash_attention
    from bc2_jax.model.position import alibi_slopes

    N = 16
    slopes = None if args.rope else jnp.asarray(alibi_slopes(N))
    tokens = Tokens(jnp.arange(args.length)[None], jnp.ones((1, args.length), jnp.int32))
    shape = (1, args.length, N, args.head_dim)
    qkv = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)]

    def loss(q, k, v):
        return jnp.sum(flash_attention(q, k, v, tokens, slopes, blocks=sizes).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    jax.block_until_ready(gradient(*qkv))
    start = time.perf_counter()
    for _ in range(repeats):
        result = gradient(*qkv)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats * 1e3


def compare(args: argparse.Namespace, counts: dict[str, list[Count]]) -> None:
    """Counts splash attention in the same blocks and prints the best of both, per 1024 x 1024 scores of one head."""

    def per_million(count: Count) -> int:
        return round(count.plain * (1024 / count.block) ** 2)

    floors = [min_cycles(CHIPS[args.chip], args.head_dim, products * 1024**2) for products in MATMULS]
    print("cycles per 1024 x 1024 scores of one head on one core, off the diagonal, without ALiBi")
    for kernel, (ours, theirs) in enumerate(zip(KERNELS, SPLASH_KERNELS, strict=True)):
        found = []
        for block in args.blocks:
            for chunk in (c for c in args.chunks if c <= block):
                try:
                    found.append(Count(block, chunk, count_cycles(args, kernel, block, chunk, False, splash=True), 0))
                except RuntimeError as error:
                    print(f"{theirs:15} {block:6} {chunk:6} does not compile: {error}", flush=True)
                    continue
                print(f"{theirs:15} {block:6} {chunk:6} {found[-1].plain:13,}", flush=True)
        pair = min(counts[ours], key=per_million), min(found, key=per_million, default=None)
        texts = [f"{per_million(c):,} ({c.block}, {c.chunk})" if c else "none compiles" for c in pair]
        print(f"{ours} {texts[0]}, {theirs} {texts[1]}, floor of the matmuls {floors[kernel]:,}")


def tune(args: argparse.Namespace) -> int:
    from bc2_jax.kernels.blocks import BlockSizes

    chip = CHIPS[args.chip]
    counts: dict[str, list[Count]] = {kernel: [] for kernel in KERNELS}
    print(f"{'kernel':15} {'block':>6} {'chunk':>6} {'off diagonal':>13} {'on it':>7}   cycles of a grid step")
    for block in args.blocks:
        for chunk in (c for c in args.chunks if c <= block):
            for kernel, name in enumerate(KERNELS):
                try:
                    plain, diagonal = (count_cycles(args, kernel, block, chunk, body) for body in (False, True))
                except RuntimeError as error:
                    print(f"{name:15} {block:6} {chunk:6} does not compile: {error}", flush=True)
                    continue
                counts[name].append(Count(block, chunk, plain, diagonal))
                print(f"{name:15} {block:6} {chunk:6} {plain:13,} {diagonal:7,}", flush=True)
    if not all(counts.values()):
        print("No candidate compiles.", file=sys.stderr)
        return 1
    # The forward pass has one chunk size; the backward pass may have another on the diagonal. Where bundles are counted
    # several are equal: then the larger, which where cycles are counted waits less.
    forward = sorted(counts["flash_forward"], key=lambda c: head_cycles(c, c, args.length))
    backward = sorted(
        ((a, b) for a in counts["flash_backward"] for b in counts["flash_backward"] if a.block == b.block),
        key=lambda pair: (head_cycles(pair[0], pair[1], args.length), -pair[0].chunk),
    )

    def sizes(one: Count, two: tuple[Count, Count]) -> BlockSizes:
        span = max(chip.span, two[0].block)
        return BlockSizes(
            one.block, one.chunk, two[0].block, two[0].chunk, two[1].chunk, span=span, vmem_mib=chip.vmem_mib
        )

    best = sizes(forward[0], backward[0])
    print(
        f"cycles of one head of {args.length}: forward {head_cycles(forward[0], forward[0], args.length):,}, "
        f"backward {head_cycles(backward[0][0], backward[0][1], args.length):,}"
    )
    if args.splash:
        compare(args, counts)
    if args.run:
        candidates = dict.fromkeys([sizes(f, b) for f in forward[:3] for b in backward[:4]])
        timed = {candidate: time_candidate(args, candidate) for candidate in candidates}
        for candidate, milliseconds in sorted(timed.items(), key=lambda item: item[1]):
            print(f"{milliseconds:9.3f} ms {', '.join(map(str, dataclasses.astuple(candidate)))}")
        best = min(timed, key=lambda candidate: timed[candidate])
    values = ", ".join(map(str, dataclasses.astuple(best)))
    print(f'    _Line("{args.chip}", {args.head_dim}, {args.length}, BlockSizes({values})),')
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    args = make_parser().parse_args(argv)
    if args.measure:
        kernel, block, chunk, diagonal = args.measure
        if args.splash:
            compile_splash(args, kernel, block, chunk)
        else:
            compile_kernel(args, kernel, block, chunk, bool(diagonal))
        return 0
    args.rope = args.rope or args.splash
    if args.splash and not CHIPS[args.chip].counted:
        print(f"--splash compares cycles, and libtpu counts none for {args.chip}.", file=sys.stderr)
        return 2
    if args.run:
        import jax

        if jax.default_backend() != "tpu":
            print("--run needs a TPU, and this machine has none.", file=sys.stderr)
            return 2
    return tune(args)
