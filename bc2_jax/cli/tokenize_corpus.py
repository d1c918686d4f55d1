"""Files of text -> packed rows for training.

    bc2 tokenize CURATED --tokenizer tokenizer.model --sequence-length 4096 --out rows
    bc2 tokenize corpus/*.jsonl --tokenizer tokenizer.model --out rows

Inputs are .parquet, .jsonl, .json (one record a row or line), .txt (one document a file), all but the first also .zst
and .gz, folders of them, or the folder that the curation wrote. A record has its text in the field `text`; it may have
a `source` (else the name of the file's folder), a quality `score` in 0..1 (else 1) and a sampling `weight` (else 1).

OUT becomes a source for `DataConfig`: rows of T + 1 tokens in OUT/SOURCE/qBUCKET, or where weights differ in wWEIGHT of
it, some documents of each held out for validation, and corpus.json. OUT appears when it is complete; stopped before,
the same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from bc2_jax.data.corpus import PROBLEMS, Corpus
from bc2_jax.data.documents import Fields
from bc2_jax.data.packing import load_manifest
from bc2_jax.data.processes import ends_at_signals, num_cores
from bc2_jax.data.tokenization import Settings, tokenize_corpus
from bc2_jax.terminal import local_path, log_to_stderr, make_console, make_table, use_utf8


def summarize(corpus: Corpus, out: Path) -> Table:
    """The parts of a corpus as a table: counts and shares of what is for training."""
    headers = ("source", "score", "weight", "documents", "tokens", "tokens/char", "rows", "share")
    table = make_table(*headers, numbers_from=3)
    for part in corpus.parts:
        manifest = load_manifest(out / part.path)
        characters = manifest.train.characters + manifest.validation.characters
        tokens = manifest.train.tokens + manifest.validation.tokens
        table.add_row(
            part.source, f"{part.min_score:.3g}-{part.max_score:.3g}", f"{part.mean_weight:g}", f"{part.documents:,}",
            f"{part.tokens:,}", f"{tokens / characters:.3f}", f"{part.rows:,}", f"{part.share:.2%}",
        )  # fmt: skip
    return table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=local_path, metavar="INPUT")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model")
    parser.add_argument("--out", required=True, type=local_path, help="folder to make")
    parser.add_argument("--sequence-length", type=int, default=4096, help="T, tokens a row (default %(default)s)")
    parser.add_argument("--processes", type=int, default=num_cores(), help="default: one a core, %(default)s here")
    parser.add_argument("--text-field", default="text", help="field or column of the text (default %(default)s)")
    parser.add_argument("--source-field", default="source", help="that of the source (default %(default)s)")
    parser.add_argument(
        "--quality-buckets", type=int, default=4, metavar="N",
        help="cut each source at the scores 1/N, 2/N, ...; 1: not at all (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of documents held out (default %(default)s)"
    )
    parser.add_argument("--rows-per-file", type=int, default=65_536, help="rows a file (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it has packed rows")
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    options = parse_arguments(argv)
    console = log_to_stderr()
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        advice = "what is finished is kept; run the same command to resume."
        with ends_at_signals(advice), Progress(*columns, console=console) as progress:
            task = progress.add_task("reading", total=None)

            def advance(stage: str, done: int, total: int) -> None:
                if stage == "tokenizing":
                    progress.update(task, description=stage, completed=done, total=total)
                else:
                    progress.update(task, description=f"packing {done}/{total}")

            corpus = tokenize_corpus(
                options.inputs,
                options.tokenizer,
                options.out,
                Settings(
                    sequence_length=options.sequence_length,
                    quality_buckets=options.quality_buckets,
                    validation_fraction=options.validation_fraction,
                    rows_per_file=options.rows_per_file,
                    fields=Fields(text=options.text_field, source=options.source_field),
                ),
                processes=options.processes,
                overwrite=options.overwrite,
                advance=advance,
            )
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"error: {error}", style="red")
        return 1
    make_console().print(summarize(corpus, options.out))
    listed = f" (see {options.out / PROBLEMS})" if corpus.invalid_documents else ""
    print(
        f"{corpus.documents:,} documents read, {corpus.empty_documents:,} empty, {corpus.invalid_documents:,} "
        f"invalid{listed}; written to {options.out}"
    )
    return 0
