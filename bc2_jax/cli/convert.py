"""Converts checkpoints between ours (Orbax), the released PyTorch layout and its relatives, and GGUF.

bc2 convert to-orbax HF_DIR CKPT
bc2 convert to-hf CKPT HF_DIR [--layout baichuan2|baichuan1|llama] [--format safetensors|bin]
bc2 convert to-hf REWARD_MODEL HF_DIR --layout llama
bc2 convert to-gguf CKPT OUT.gguf [--type f16|bf16|q8_0]
bc2 convert merge-lora BASE ADAPTER HF_DIR [--layout baichuan2|baichuan1|llama] [--format safetensors|bin]
bc2 convert to-peft ADAPTER PEFT_DIR [--layout baichuan2|llama]
bc2 convert from-peft PEFT_DIR CKPT --base BASE
bc2 convert inspect PATH
bc2 convert diff A B

A path may be a PyTorch folder, a checkpoint or a run, of an adapter also a PEFT folder; docs/conversion.md has the
details.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bc2_jax.convert.reading import add_reading_options, reading_of
from bc2_jax.cpu import keep_heap
from bc2_jax.terminal import local_path, make_console, make_table, use_utf8

if TYPE_CHECKING:
    from bc2_jax.convert.conversion import Options, Summary

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("bfloat16", "float16", "float32")
out, err = make_console(), make_console(stderr=True)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or "1000000"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-zA-Z]*)", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("--resize-vocab", type=int, metavar="N", help="grow the vocabulary to N token ids")
    reading.add_argument(
        "--allow-unused-rows", action="store_true", help="accept a vocabulary larger than the tokenizer"
    )
    add_reading_options(reading)
    common = argparse.ArgumentParser(add_help=False, parents=[reading])
    common.add_argument("--overwrite", action="store_true", help="replace the target if we wrote all of it")
    common.add_argument("--strict", action="store_true", help="refuse NaN and infinite values instead of naming them")
    common.add_argument("--no-hashes", action="store_true", help="do not check the source's files against known hashes")
    verify = argparse.ArgumentParser(add_help=False)
    verify.add_argument("--verify", action="store_true", help="read the result again and compare every tensor")

    command = commands.add_parser("to-orbax", parents=[common, verify], help="write a model as a bc2_jax checkpoint")
    command.add_argument("source", metavar="HF_DIR", type=local_path)
    command.add_argument("target", metavar="CKPT", type=local_path)
    command.add_argument("--dtype", choices=_DTYPES, help="default: as in the files")

    torch = argparse.ArgumentParser(add_help=False, parents=[common, verify])
    torch.add_argument("--dtype", choices=_DTYPES, help="default: the source's; bfloat16 of a training checkpoint")
    torch.add_argument(
        "--layout", choices=("baichuan2", "baichuan1", "llama"), default="baichuan2",
        help="baichuan2: as released; baichuan1: head rows normalised; llama: LlamaForCausalLM (RoPE models)",
    )  # fmt: skip
    torch.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    torch.add_argument("--max-shard-size", type=parse_size, default="5GB", help="bytes a file, for example 5GB")
    command = commands.add_parser("to-hf", parents=[torch], help="write a model as a PyTorch folder")
    command.add_argument("source", metavar="CKPT", type=local_path)
    command.add_argument("target", metavar="HF_DIR", type=local_path)

    command = commands.add_parser("merge-lora", parents=[torch], help="write a model with an adapter in its weights")
    command.add_argument("source", metavar="BASE", type=local_path)
    command.add_argument("adapter", metavar="ADAPTER", type=local_path, help="a PEFT folder, or a bc2_jax LoRA run")
    command.add_argument("target", metavar="HF_DIR", type=local_path)

    command = commands.add_parser("to-peft", help="write an adapter as PEFT reads it")
    command.add_argument("source", metavar="ADAPTER", type=local_path, help="a bc2_jax LoRA run, or a PEFT folder")
    command.add_argument("target", metavar="PEFT_DIR", type=local_path)
    command.add_argument(
        "--layout", choices=("baichuan2", "llama"),
        help="modules as in released models (W_pack) or as in LLaMA; default: the base model's, or the adapter's own",
    )  # fmt: skip
    command.add_argument("--base", metavar="BASE", help="model that the adapter is for; default: what it says itself")
    command.add_argument("--overwrite", action="store_true", help="replace the target if we wrote all of it")

    command = commands.add_parser("from-peft", help="write a PEFT adapter as a bc2_jax checkpoint")
    command.add_argument("source", metavar="PEFT_DIR", type=local_path)
    command.add_argument("target", metavar="CKPT", type=local_path)
    command.add_argument("--base", metavar="BASE", help="model that it is for, of which only the config is read")
    command.add_argument("--overwrite", action="store_true", help="replace the target if we wrote all of it")

    command = commands.add_parser("to-gguf", parents=[common], help="write a model as a GGUF file for llama.cpp")
    command.add_argument("source", metavar="CKPT", type=local_path)
    command.add_argument("target", metavar="OUT.gguf", type=local_path)
    command.add_argument("--type", choices=("f16", "bf16", "q8_0"), default="f16")

    command = commands.add_parser("inspect", parents=[reading], help="tell what is in a model and what is wrong")
    command.add_argument("source", metavar="PATH", type=local_path)

    command = commands.add_parser("diff", help="compare two models tensor by tensor")
    command.add_argument("source", metavar="A", type=local_path)
    command.add_argument("target", metavar="B", type=local_path)
    return parser


@contextlib.contextmanager
def progress_bar() -> Iterator[tuple]:
    """(announce the total bytes, advance by some bytes) of a bar with speed and time left; no bar off a terminal."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("convert", total=None)
        yield (lambda total: bar.update(task, total=total)), (lambda done: bar.advance(task, done))


def convert(args: argparse.Namespace, options: Options) -> Summary:
    from bc2_jax.convert import conversion

    if args.command == "to-orbax":
        return conversion.to_orbax(args.source, args.target, options, args.dtype)
    if args.command in ("to-hf", "merge-lora"):
        how = (options, args.dtype, args.layout, args.format, args.max_shard_size)
        if args.command == "to-hf" and args.layout == "llama":
            from bc2_jax.convert.reward_export import export_reward_model, is_reward_model

            if is_reward_model(args.source):
                return export_reward_model(
                    args.source, args.target, options, args.dtype or "bfloat16", args.max_shard_size
                )
        if args.command == "to-hf":
            return conversion.to_hf(args.source, args.target, *how)
        from bc2_jax.convert.merging import merge_lora

        return merge_lora(args.source, args.adapter, args.target, *how)
    return conversion.to_gguf(args.source, args.target, options, args.type)


def make_options(args: argparse.Namespace, **others: Any) -> Options:
    """What the options of reading say, and `others`."""
    from bc2_jax.convert.conversion import Options

    return Options(
        resize_vocab=args.resize_vocab, allow_unused_rows=args.allow_unused_rows, reading=reading_of(args), **others
    )


def run_conversion(args: argparse.Namespace) -> int:
    keep_heap()  # the same few large buffers, over and over
    with progress_bar() as progress:
        options = make_options(
            args, strict=args.strict, overwrite=args.overwrite, verify=getattr(args, "verify", False),
            check_hashes=not args.no_hashes, progress=progress,
        )  # fmt: skip
        summary = convert(args, options)
    if summary.not_finite:
        err.print(f"warning: not finite: {', '.join(summary.not_finite)}")
    gigabytes = summary.bytes_read / 1e9
    out.print(
        f"{summary.config.num_parameters():,} parameters in {summary.tensors} arrays, {gigabytes:.2f} GB read and "
        f"{summary.bytes_written / 1e9:.2f} GB written in {summary.seconds:.1f} s "
        f"({1000 * gigabytes / summary.seconds:.0f} MB/s)"
    )
    if summary.hashed_files is not None:
        out.print(f"{summary.hashed_files} source files have a known checksum, and it is right")
    if getattr(args, "verify", False):
        out.print("read back and compared: every tensor is as it was meant to be")
    for note in summary.notes:
        out.print(note)
    out.print(f"parameters sha256 {summary.fingerprint}")
    out.print(f"Wrote {args.target}.")
    return 0


def run_adapter(args: argparse.Namespace) -> int:
    """Carries an adapter from one format to the other."""
    from bc2_jax.convert.merging import convert_adapter

    adapter = convert_adapter(
        args.source, args.target, to_peft=args.command == "to-peft", base=args.base,
        layout=getattr(args, "layout", None), overwrite=args.overwrite,
    )  # fmt: skip
    out.print(adapter.config.describe())
    out.print(f"Wrote {args.target}.")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    from bc2_jax.convert.adapter import describe, find_adapter
    from bc2_jax.convert.inspection import inspect
    from bc2_jax.convert.reward import describe_reward_model
    from bc2_jax.validation import join_some

    if told := describe_reward_model(args.source):
        for line in told:
            out.print(line)
        return 0
    if (adapter := find_adapter(args.source)) is not None:
        for line in describe(adapter):
            out.print(line)
        return 0
    found = inspect(args.source, make_options(args))
    table = make_table("tensor", "count", "shape", "dtype", title=str(found.path))
    for group in found.groups:
        table.add_row(group.name, str(group.count), " x ".join(map(str, group.shape)), group.dtype)
    out.print(table)
    lines = {
        "format": found.format, "model": found.model, "parameters": f"{found.parameters:,}",
        "size": f"{found.bytes / 1e9:.3f} GB", "head": found.head,
        **{f"why {i}": why for i, why in enumerate(found.why, 1)},
    }  # fmt: skip
    for kind in ("missing", "unexpected", "misshapen"):
        lines[kind] = join_some(getattr(found, kind)) or "none"
    lines["left out"] = join_some(found.left_out) or "none"
    lines["not read"] = "checksums and values, which a conversion checks as it reads them"
    for name, text in lines.items():
        out.print(f"{name:12}{text}")
    if found.refusal is not None:
        print(f"error: {found.refusal}", file=sys.stderr)
    return 0 if found.is_consistent else 1


def run_diff(args: argparse.Namespace) -> int:
    from bc2_jax.convert.inspection import diff

    with progress_bar() as (_, advance):
        found = diff(args.source, args.target, advance)
    for field in found.fields:
        out.print(f"config {field}")
    if found.arrays:
        table = make_table("array", "layers", "dtypes", "largest difference", "relative to the largest value")
        for array in found.arrays:
            layers = "" if array.layers == (None,) else ", ".join(map(str, array.layers))
            table.add_row(array.path, layers, " / ".join(array.dtypes), f"{array.max_abs:.3e}", f"{array.max_rel:.3e}")
        out.print(table)
    out.print(f"{found.total - len(found.arrays)} of {found.total} arrays are equal bit for bit")
    return 0 if found.is_same else 1


_RUN = {"inspect": run_inspect, "diff": run_diff, "to-peft": run_adapter, "from-peft": run_adapter}


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    args = make_parser().parse_args(argv)
    # Nothing here needs an accelerator: it may be another process's, or not be there, of which libtpu prints pages.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bc2_jax").setLevel(logging.INFO)  # tells how the position scheme was inferred
    try:
        return _RUN.get(args.command, run_conversion)(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
