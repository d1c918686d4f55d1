"""Writes a model in int8 or int4 and measures how close it is to the model in bfloat16.

bc2 quantize MODEL OUT --int8
bc2 quantize MODEL OUT --int4 --text held_out.jsonl books/

MODEL is a folder in the released PyTorch layout, or a bc2_jax checkpoint or run. OUT is a folder that `bc2 serve`,
`generate`, `evaluate` and `perplexity` take as MODEL; it cannot be trained or converted. The table has the bytes of the
weights, perplexity, KL divergence and how often both find the same token most likely: on --text, files as `bc2
perplexity` reads them, else on the run's held-out rows if they exist, else on text that comes with Python.
docs/quantization.md says how weights are rounded and what to expect.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import here, local_path, make_console, make_table, run_program
from bc2_jax.validation import require

if TYPE_CHECKING:
    from rich.table import Table

    from bc2_jax.convert.pretrained import FoundModel
    from bc2_jax.data.batch import Rows
    from bc2_jax.evaluate.agreement import Agreement
    from bc2_jax.model.quantized import Scheme
    from bc2_jax.tokenizer import Tokenizer

ROWS = 8
LONGEST = 1024
"""Of a row of text."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", type=local_path)
    parser.add_argument("out", metavar="OUT", type=local_path)
    schemes = parser.add_mutually_exclusive_group(required=True)
    for scheme, about in (
        ("int8", "a byte for each weight, a scale for each output"),
        ("int4", "half a byte for each weight of the layers, a scale for 128 of them; the head is int8"),
    ):
        schemes.add_argument(f"--{scheme}", action="store_const", const=scheme, dest="scheme", help=about)
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="held-out text to compare on")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of a record (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32768, metavar="N", help="of it, at most (default %(default)s)")
    parser.add_argument("--tensor", type=int, metavar="N", help="use all devices, cutting heads and vocabulary in N")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a quantized model")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write the figures")
    return parser


def read_files(args: argparse.Namespace) -> Iterator[str]:
    """The texts of --text."""
    from bc2_jax.data.documents import Fields
    from bc2_jax.data.text_files import find_text_files
    from bc2_jax.evaluate.perplexity import read_texts

    for file in find_text_files(args.text, "--text").files:
        for found in read_texts(file, Fields(text=args.text_field)):
            if isinstance(found, str):
                print(f"left out: {found}", file=sys.stderr)
            else:
                yield found.text


def held_out_rows(found: FoundModel, tokens: int) -> list[Rows]:
    """The held-out rows of the run that made a checkpoint; none if it does not record them or they were removed."""
    from bc2_jax.config import DataConfig
    from bc2_jax.config.record import from_record
    from bc2_jax.data.loader import make_validation_batches

    record = found.metadata.get("config", {}).get("data")
    try:
        data = from_record(DataConfig, record)
        batches = make_validation_batches(data, ROWS)
    except (TypeError, ValueError, OSError, AttributeError):
        return []
    count = max(1, min(len(batches), tokens // (ROWS * data.sequence_length)))
    # Evenly over all of them: the sources of a run may follow one another.
    return [batches[number * len(batches) // count] for number in range(count)]


def choose_rows(args: argparse.Namespace, found: FoundModel, tokenizer: Tokenizer) -> tuple[list[Rows], str]:
    """What both models are run on, and what it is."""
    from bc2_jax.data.demo_corpus import python_documents
    from bc2_jax.evaluate.agreement import rows_of_texts

    config = found.config
    if not args.text and (rows := held_out_rows(found, args.tokens)):
        return rows, f"held-out rows of the run {found.path.parent.parent}"
    options: dict[str, Any] = {
        "length": min(config.model_max_length, LONGEST), "rows": ROWS, "prefix_id": config.bos_token_id,
    }  # fmt: skip
    if args.text:
        return rows_of_texts(tokenizer, read_files(args), tokens=args.tokens, **options), ", ".join(args.text)
    documents = python_documents()
    rows = [
        batch
        for texts in documents.values()
        for batch in rows_of_texts(tokenizer, texts, tokens=args.tokens // len(documents), **options)
    ]
    return rows, "English documentation and code that come with Python, which the model may have been trained on"


def tabulate(scheme: Scheme, sizes: tuple[int, int], agreement: Agreement) -> Table:
    table = make_table("", "bfloat16", scheme, numbers_from=1)
    before, after = sizes
    table.add_row("bytes of weights", f"{before:,}", f"{after:,} ({after / before:.1%})")
    table.add_row("perplexity", f"{agreement.reference_perplexity:.4f}", f"{agreement.changed_perplexity:.4f}")
    table.add_row("KL divergence from bfloat16, nats a token", "", f"{agreement.kl:.5f} +- {agreement.kl_stderr:.5f}")
    table.add_row("same most likely token", "", f"{agreement.same_top:.2%}")
    return table


def run(args: argparse.Namespace) -> None:
    require(args.tokens > 0, "--tokens", args.tokens, "it must be positive")
    choose_cpu_without_tpu()
    # Imported here so that --help and a typo answer at once.
    import jax
    from flax import nnx

    from bc2_jax.config import MeshConfig
    from bc2_jax.convert import quantized
    from bc2_jax.convert.folder import check_free
    from bc2_jax.convert.pretrained import find_model, find_tokenizer, load_pretrained
    from bc2_jax.convert.source import open_source
    from bc2_jax.evaluate.agreement import compare, run_reference
    from bc2_jax.model.layout import lay_out
    from bc2_jax.model.quantized import bytes_of
    from bc2_jax.sharding import make_mesh
    from bc2_jax.tokenizer import Tokenizer

    check_free(args.out.absolute(), args.overwrite, quantized.foreign_in_quantized)
    source, found = open_source(args.model), find_model(args.model)  # which refuses a model that is quantized
    tokenizer_path = find_tokenizer(args.model)
    rows, text = choose_rows(args, found, Tokenizer(tokenizer_path))
    require(bool(rows), "--text", args.text, "it must have text")
    mesh = None if args.tensor is None else make_mesh(MeshConfig(tensor=args.tensor))
    model = load_pretrained(args.model, dtype="bfloat16", mesh=mesh)
    before = bytes_of(nnx.state(model))
    reference = run_reference(model, rows)
    model = lay_out(model, donate=True, quantize=args.scheme)
    quantized.save(
        model, args.out, tokenizer=tokenizer_path, generation=source.generation, chat_template=source.chat_template,
        overwrite=args.overwrite,
    )  # fmt: skip
    out = make_console()
    out.print(f"written to {here(args.out)}")
    agreement, after = compare(reference, model), bytes_of(nnx.state(model))
    out.print(tabulate(args.scheme, (before, after), agreement))
    out.print(f"on {agreement.tokens:,} tokens: {text}")
    if jax.default_backend() == "cpu":
        out.print("On a CPU quantized weights save memory, not time: XLA makes them wide before it multiplies.")
    if args.json is not None:
        figures = {
            "model": str(found.path),
            "scheme": args.scheme,
            "text": text,
            "bytes": after,
            "bytes_bfloat16": before,
        }
        args.json.write_text(json.dumps(figures | agreement._asdict(), indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, make_parser(), argv)
