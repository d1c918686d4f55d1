"""Converts checkpoints between ours (Orbax) and the released PyTorch layout.

python tools/convert.py to-orbax HF_DIR CKPT
python tools/convert.py to-hf CKPT HF_DIR [--dtype bfloat16|float16|float32] [--max-shard-size 5GB] [--overwrite]
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or "1000000"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-zA-Z]*)", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="write a checkpoint of ours as a PyTorch folder")
    to_hf.add_argument("checkpoint", metavar="CKPT", type=Path)
    to_hf.add_argument("folder", metavar="HF_DIR", type=Path)
    to_hf.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    to_hf.add_argument("--max-shard-size", type=parse_size, default="5GB", help="bytes a file, for example 5GB")
    to_hf.add_argument("--overwrite", action="store_true", help="replace HF_DIR if it exists")
    to_orbax = commands.add_parser("to-orbax", help="read a PyTorch folder into a checkpoint of ours")
    to_orbax.add_argument("folder", metavar="HF_DIR", type=Path)
    to_orbax.add_argument("checkpoint", metavar="CKPT", type=Path)
    return parser


def run(args: argparse.Namespace) -> None:
    # Imported here so that --help and a typo answer at once.
    from bc2_jax import checkpoint
    from bc2_jax.convert import hf

    if args.command == "to-hf":
        if args.folder.exists() and not args.overwrite:  # before the checkpoint is read, which may take minutes
            raise FileExistsError(f"{args.folder} exists; pass --overwrite to replace it.")
        params, config = checkpoint.load_params(args.checkpoint)
        tokenizer = checkpoint.find_tokenizer(args.checkpoint)
        hf.save_folder(params, config, args.folder, args.dtype, args.max_shard_size, tokenizer, args.overwrite)
    else:
        if args.checkpoint.exists():
            raise FileExistsError(f"{args.checkpoint} exists.")
        config = hf.read_config(args.folder)
        tokenizer = checkpoint.find_tokenizer(args.folder)
        checkpoint.save_params(hf.load_params(args.folder, config), config, args.checkpoint, tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bc2_jax").setLevel(logging.INFO)  # tells how the position scheme was inferred
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {args.folder if args.command == 'to-hf' else args.checkpoint}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
