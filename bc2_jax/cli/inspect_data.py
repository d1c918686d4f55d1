"""Shows packed rows: batches as the model sees them, counts, copies of validation in training, benchmark items.

    bc2 inspect-data ROWS --tokenizer tokenizer.model --benchmarks ceval.jsonl --json inspection.json

ROWS is a folder written by bc2 tokenize or bc2 prepare-chat, or one that holds several; a document of
the latter is a conversation, or a prompt with a chosen and a rejected answer. Without --tokenizer nothing is shown as
text. A held-out document is a duplicate if training has it too, a near one if training has most of its n-grams; a
benchmark item is hit if training has one of its n-grams.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bc2_jax.terminal import local_path, make_console, make_table, use_utf8

if TYPE_CHECKING:
    from bc2_jax.data.batch import Rows
    from bc2_jax.data.inspection import Inspection, Place, SplitCounts
    from bc2_jax.data.row_stream import RowSource
    from bc2_jax.tokenizer import Tokenizer

_EXAMPLE_TOKENS = 40


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=local_path, metavar="ROWS")
    parser.add_argument("--tokenizer", help="SentencePiece model the rows were made with")
    parser.add_argument("--batches", type=int, default=2, help="training batches to show (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows a batch (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="data.seed of the run (default %(default)s)")
    parser.add_argument("--html", type=local_path, metavar="FILE", help="write the batches as a page")
    parser.add_argument("--benchmarks", nargs="+", type=local_path, default=[], metavar="FILE", help=".jsonl or .txt")
    parser.add_argument(
        "--benchmark-fields", nargs="+", metavar="FIELD", help="of a .jsonl object; default: every string in it"
    )
    parser.add_argument("--ngram", type=int, default=13, help="tokens an n-gram (default %(default)s)")
    parser.add_argument(
        "--near-share", type=float, default=0.5,
        help="share of n-grams that makes a held-out document a near duplicate (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--near-tokens", type=int, default=8_000_000,
        help="compare a sample of the held-out documents above this many tokens, of 65 bytes (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--examples", type=int, default=3, help="of each kind to print (default %(default)s)")
    parser.add_argument("--out", type=local_path, metavar="DIR", help="folder for lengths.png")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write all counts and places")
    return parser.parse_args(arguments)


def read_batches(sources: Sequence[RowSource], options: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """(name, row) of the first training batches, of all sources with the same weight."""
    from bc2_jax.config import DataConfig, SourceConfig
    from bc2_jax.data.loader import make_train_loader

    used = [source for source in sources if source.manifest.train.rows]
    data = DataConfig(
        sources=tuple(SourceConfig(path=str(source.path)) for source in used),
        tokenizer=options.tokenizer,
        sequence_length=sources[0].manifest.sequence_length,
        global_batch_size=options.batch_size,
        seed=options.seed,
    )
    loader = make_train_loader(data, process_index=0, process_count=1)
    for step in range(options.batches if used else 0):
        batch = loader[step]
        for index in range(options.batch_size):
            yield f"batch {step}, row {index}", {name: array[index] for name, array in batch.items()}


def tabulate(splits: Sequence[SplitCounts]) -> Table:
    names = ("rows", "documents", "tokens", "padding", "tokens / character", "mean length", "longest")
    table = make_table("source", "split", *names, numbers_from=2)
    for counts in splits:
        rate = f"{counts.tokens / counts.characters:.3f}" if counts.characters else "-"
        mean = f"{(counts.tokens - counts.documents) / counts.documents:,.0f}" if counts.documents else "-"
        numbers = (counts.rows, counts.documents, counts.tokens, counts.padding)
        cells = [f"{number:,}" for number in numbers]
        table.add_row(counts.source, counts.split, *cells, rate, mean, f"{counts.longest_document:,}")
    return table


def print_lengths(console: Console, splits: Sequence[SplitCounts]) -> None:
    """Text bars: training documents by length in powers of two."""
    from bc2_jax.data.inspection import BINS_PER_OCTAVE

    octaves: dict[int, int] = {}
    for counts in splits:
        for index, count in enumerate(counts.length_histogram):
            octaves[index // BINS_PER_OCTAVE] = octaves.get(index // BINS_PER_OCTAVE, 0) + count
    filled = [octave for octave, count in octaves.items() if count]
    console.print("\nDocuments by length in tokens, both splits")
    for octave in range(min(filled), max(filled) + 1) if filled else ():
        count = octaves[octave]
        bar = "#" * round(50 * count / max(octaves.values()))
        console.print(f"{2**octave:>10,} .. {2 ** (octave + 1) - 1:<10,} {count:>12,} {bar}")


def plot_lengths(splits: Sequence[SplitCounts], file: Path) -> None:
    from bc2_jax.data.inspection import BINS_PER_OCTAVE
    from bc2_jax.train.pictures import picture

    with picture(file, figsize=(8, 4.5)) as axes:
        # The largest, for more lines can't be told apart.
        for counts in sorted(splits, key=lambda counts: -counts.tokens)[:12]:
            if counts.documents:
                edges = [2 ** (index / BINS_PER_OCTAVE) for index in range(len(counts.length_histogram) + 1)]
                shares = [count / counts.documents for count in counts.length_histogram]
                style = "-" if counts.split == "train" else ":"
                label = f"{counts.split} {counts.source}".replace("$", r"\$")  # which would begin a formula
                axes.stairs(shares, edges, label=label, linestyle=style)
        axes.set(
            xscale="log", xlabel="tokens a document", ylabel=f"share of documents, bins of 1/{BINS_PER_OCTAVE} octave"
        )
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="small")


class Report:
    """Prints what was found, with the text of examples if there is a tokenizer."""

    def __init__(
        self, console: Console, sources: Sequence[RowSource], tokenizer: Tokenizer | None, examples: int
    ) -> None:
        self.console, self.tokenizer, self.examples = console, tokenizer, examples
        self.sources = {source.name: source for source in sources}

    def quote(self, place: Place) -> str:
        from bc2_jax.data.row_stream import read_document

        tokens = read_document(self.sources[place.source], place.split, place.position, _EXAMPLE_TOKENS)
        shown = self.tokenizer.decode(tokens.tolist()) if self.tokenizer else " ".join(map(str, tokens.tolist()))
        return f"      {place.source} {place.split} row {place.row}: {shown!r}"

    def line(self, text: str) -> None:
        self.console.print(text)

    def duplicates(self, found: Inspection) -> None:
        held_out = sum(counts.documents for counts in found.splits if counts.split == "validation")
        self.line(f"\nHeld-out documents that training has too: {len(found.exact):,} of {held_out:,} exactly")
        for copy in found.exact[: self.examples]:
            self.line(f"   {copy.tokens:,} tokens\n{self.quote(copy.held_out)}\n{self.quote(copy.training)}")
        self.line(
            f"... and nearly, with at least {found.near_share:.0%} of the {found.ngram}-grams: {len(found.near):,} of "
            f"{found.compared_documents:,} compared"
        )
        for copy in found.near[: self.examples]:
            where = f"{self.quote(copy.held_out)}\n{self.quote(copy.training)}"
            self.line(f"   {copy.tokens:,} tokens, {copy.share:.0%} in training\n{where}")

    def benchmarks(self, found: Inspection) -> None:
        self.line(f"\nBenchmark items with a {found.ngram}-gram in training")
        for file in found.benchmarks:
            self.line(
                f"   {file.file}: {file.hit:,} of {file.items:,} ({file.hit / file.items:.1%}); {file.short:,} are too "
                f"short to be found"
            )
        for hit in sorted(found.hits, key=lambda hit: -hit.share)[: self.examples]:
            where = f"{hit.file}:{hit.line}, {hit.share:.0%} of it in training"
            self.line(f"   {where}\n      {hit.beginning!r}\n{self.quote(hit.training)}")


def run(options: argparse.Namespace, console: Console) -> None:
    # Imported here so that --help and a typo answer at once.
    from bc2_jax.data.batch_view import render_html, render_row, row_arrays, row_title
    from bc2_jax.data.inspection import inspect_sources, read_benchmark
    from bc2_jax.data.row_stream import find_sources
    from bc2_jax.tokenizer import Tokenizer
    from bc2_jax.validation import require

    for field in ("batches", "examples"):
        require(getattr(options, field) >= 0, f"--{field}", getattr(options, field), "it must be at least 0")
    needed = "it needs --tokenizer"
    require(not options.benchmarks or options.tokenizer, "--benchmarks", [str(p) for p in options.benchmarks], needed)
    require(options.html is None or options.tokenizer, "--html", str(options.html), needed)
    for file in (options.html, options.json):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    sources = find_sources(options.rows)
    tokenizer = Tokenizer(options.tokenizer) if options.tokenizer else None
    if tokenizer is not None:
        made_with = sources[0].manifest.tokenizer_sha256
        legal = f"the rows were made with another (SHA-256 {made_with[:12]}, not {tokenizer.fingerprint[:12]})"
        require(tokenizer.fingerprint == made_with, "--tokenizer", options.tokenizer, legal)
        items = [
            item
            for file in options.benchmarks
            for item in read_benchmark(file, tokenizer, options.ngram, options.benchmark_fields)
        ]
        rows = list(read_batches(sources, options))
        for name, row in rows:
            console.print(f"{name}: {row_title(row)}", style="bold")
            console.print(Text(row_arrays(row), "dim"))
            console.print(render_row(row, tokenizer), end="\n\n")
        if options.html is not None:
            options.html.write_text(render_html(rows, tokenizer), encoding="utf-8")
    else:
        items = []
        console.print("Batches are not shown: that needs --tokenizer.")

    columns = (TextColumn("reading tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console(stderr=True)) as progress:
        total = sum(split.tokens for s in sources for split in (s.manifest.train, s.manifest.validation))
        task = progress.add_task("", total=total)
        found = inspect_sources(
            sources,
            items,
            n=options.ngram,
            near_share=options.near_share,
            near_tokens=options.near_tokens,
            advance=lambda tokens: progress.advance(task, tokens),
        )
    console.print(tabulate(found.splits))
    print_lengths(console, found.splits)
    report = Report(console, sources, tokenizer, options.examples)
    for difference in found.differences:
        console.print(f"damaged: {difference}", style="red")
    report.duplicates(found)
    if options.benchmarks:
        report.benchmarks(found)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        plot_lengths(found.splits, options.out / "lengths.png")
    if options.json is not None:
        text = json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n"
        options.json.write_text(text, encoding="utf-8", errors="backslashreplace")  # of paths that are not UTF-8


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    options = parse_arguments(argv)
    try:
        run(options, make_console())
    except (ValueError, OSError) as error:
        make_console(stderr=True).print(f"error: {error}", style="red")
        return 1
    return 0
