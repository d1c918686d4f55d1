"""Time and memory of token log-probabilities with and without the full logits tensor, on the current device.

python benchmarks/log_probs.py [--batch 4] [--length 512] [--hidden 512] [--vocab 16384] [--chunk 256] [--dtype float32]

    naive   log_softmax of the logits [B, T, V], then a lookup of the labels; gradient by automatic differentiation
    ours    `bc2_jax.model.log_probs.token_log_probs`, once per --chunk

Each is measured alone and with the gradient of a weighted sum with respect to hidden states and head. Times are the
best of --repeats, alternating; memory is what the compiled program needs beside its arguments and results.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

from bc2_jax.model.log_probs import token_log_probs

LogProbs = Callable[[Array, Array, Array], Array]


def naive(h_BTD: Array, rows_VD: Array, labels_BT: Array) -> Array:
    """log p(label) [B, T] of labels that are tokens."""
    exact = jnp.promote_types(h_BTD.dtype, jnp.float32)
    logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, rows_VD.astype(h_BTD.dtype), preferred_element_type=exact)
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), labels_BT[..., None], axis=-1)[..., 0]


def ours(h_BTD: Array, rows_VD: Array, labels_BT: Array, chunk: int) -> Array:
    return token_log_probs(h_BTD, rows_VD, labels_BT, chunk).log_prob


def with_gradient(function: LogProbs, h: Array, rows: Array, labels: Array, weights: Array) -> tuple[Array, ...]:
    """log p(label), and the gradients of its weighted sum."""
    found, pull_back = jax.vjp(lambda h, rows: function(h, rows, labels), h, rows)
    return found, *pull_back(weights)


def alone(function: LogProbs, h: Array, rows: Array, labels: Array, weights: Array) -> Array:
    return function(h, rows, labels)


def make_arguments(args: argparse.Namespace) -> tuple[Array, ...]:
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.standard_normal((args.batch, args.length, args.hidden)), args.dtype)
    rows = jnp.asarray(rng.standard_normal((args.vocab, args.hidden)) / args.hidden**0.5, jnp.float32)
    labels = jnp.asarray(rng.integers(0, args.vocab, (args.batch, args.length)), jnp.int32)
    return h, rows, labels, jnp.asarray(rng.standard_normal(labels.shape), jnp.float32)


def measure(programs: dict[str, jax.stages.Compiled], arguments: tuple[Array, ...], repeats: int) -> dict[str, float]:
    """Seconds of each, the least of `repeats`."""
    seconds = dict.fromkeys(programs, float("inf"))
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def temporary_bytes(program: jax.stages.Compiled) -> int:
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--chunk", type=int, nargs="+", default=(128, 256, 512), help="tokens, one line each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the hidden states")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    arguments = make_arguments(args)
    functions = {"naive": naive} | {f"ours, chunks of {c}": functools.partial(ours, chunk=c) for c in args.chunk}
    size = f"{args.batch} x {args.length} tokens, D = {args.hidden}, V = {args.vocab}, {args.dtype}"
    table = Table("", title=f"{size}, on {jax.devices()[0].device_kind}")
    columns = []
    for run, title in ((alone, "values"), (with_gradient, "with gradients")):
        programs = {
            name: jax.jit(functools.partial(run, function)).lower(*arguments).compile()
            for name, function in functions.items()
        }
        seconds = measure(programs, arguments, args.repeats)
        memory = {name: temporary_bytes(program) for name, program in programs.items()}
        for label, numbers, unit, scale in (("time", seconds, "ms", 1e3), ("memory", memory, "MiB", 2**-20)):
            table.add_column(f"{title}: {label}", justify="right")
            columns.append(
                [f"{n * scale:.0f} {unit} ({n / numbers['naive']:.2f}x)" for n in (numbers[name] for name in functions)]
            )
    for name, cells in zip(functions, zip(*columns, strict=True), strict=True):
        table.add_row(name, *cells)
    Console(soft_wrap=True, width=140).print(table)


if __name__ == "__main__":
    main()
