"""Continues text with a model: a folder in the released PyTorch layout, or a checkpoint or run of ours.

python tools/generate.py CHECKPOINT --prompt "登鹳雀楼->王之涣\\n夜雨寄北->"
python tools/generate.py CHECKPOINT --prompts-file prompts.txt --greedy --max-new-tokens 64

One prompt on a terminal is answered as the text is written; several are printed when all are done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.3, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=5, help="choose among this many tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=0.85, help="choose among tokens of this total probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.05, help="1 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--greedy", action="store_true", help="same as --temperature 0 --repetition-penalty 1")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tensor", type=int, metavar="N", help="use all devices, cutting heads and vocabulary in N")
    return parser


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        lines = args.prompts_file.read_text(encoding="utf-8").split("\n")
        prompts += [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise ValueError("there is no prompt: give --prompt or --prompts-file.")
    return prompts


def run(args: argparse.Namespace) -> None:
    prompts = read_prompts(args)
    # Imported here so that --help and a typo answer at once.
    from bc2_jax.config import MeshConfig
    from bc2_jax.convert.pretrained import find_tokenizer, load_pretrained
    from bc2_jax.infer.generate import generate
    from bc2_jax.infer.prepared import prepare
    from bc2_jax.infer.stream import TextStream
    from bc2_jax.sharding import make_mesh
    from bc2_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(find_tokenizer(args.checkpoint))
    mesh = None if args.tensor is None else make_mesh(MeshConfig(tensor=args.tensor))
    model = prepare(load_pretrained(args.checkpoint, dtype=args.dtype, mesh=mesh), donate=True)
    stream = TextStream(tokenizer.decode) if len(prompts) == 1 and sys.stdout.isatty() else None

    def show(step: int, tokens: list[int | None]) -> None:
        if stream is not None and tokens[0] is not None:
            print(stream.add(tokens[0]), end="", flush=True)

    if stream is not None:
        print(prompts[0], end="", flush=True)
    continuations = generate(
        model,
        tokenizer.encode_batch(prompts),
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=1.0 if args.greedy else args.repetition_penalty,
        seed=args.seed,
        on_token=None if stream is None else show,
    )
    if stream is not None:
        print(stream.finish())
        return
    for prompt, tokens in zip(prompts, continuations, strict=True):
        print(prompt + tokenizer.decode(tokens) + ("\n" if len(prompts) > 1 else ""))


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
