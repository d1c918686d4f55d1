"""Documents -> a tokenizer with Baichuan 2's settings, checked, and compared with others on documents it has not seen.

    bc2 train-tokenizer CURATED --vocab-size 125696 --out tokenizer.model
    bc2 train-tokenizer CURATED --vocab-size 125696 --shares zh=.45,en=.35,code=.2 --compare other.model

Inputs are folders written by the curation, .parquet, .jsonl, .json or .txt files (but for the first also .zst and .gz),
or folders of these; a record
may have a language and a weight. Beside the model there will be a .report.json with all figures. The exit code is 1 if
a check fails; the model is then left under the name OUT.failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bc2_jax.data.processes import ends_at_signals
from bc2_jax.files import lock
from bc2_jax.terminal import local_path, log_to_stderr, make_console, make_table, use_utf8

if TYPE_CHECKING:
    from bc2_jax.data.documents import InvalidDocument
    from bc2_jax.data.tokenizer_report import Check, Compression
    from bc2_jax.data.tokenizer_sample import TokenizerSample
    from bc2_jax.tokenizer import TrainingText

logger = logging.getLogger(__name__)
Document = tuple[str, str, float]
"""Text, language, weight."""
FORMULA = "tokens / Unicode code points, and tokens / UTF-8 bytes; this formula is ours, the paper prints none"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=local_path, metavar="INPUT")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces; Baichuan 2 has 125696")
    parser.add_argument(
        "--out", type=local_path, default=Path("tokenizer.model"), help="model to write (default %(default)s)"
    )
    parser.add_argument(
        "--sample-bytes", type=int, default=200_000_000,
        help="train on this much text at most; memory is 20 to 25 times that (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shares", type=parse_shares, metavar="LANGUAGE=SHARE,...",
        help="of the sample's bytes, by language; other languages are left out (default: by the documents' weights)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01,
        help="share of documents held out, the same ones as in tokenize_corpus.py (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--measure-bytes", type=int, default=5_000_000,
        help="held-out text a language to measure with (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--character-coverage", type=float, default=0.9999, help="as in the paper (default %(default)s)"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="TOKENIZER",
        help="SentencePiece models, files tokenizer.json, tiktoken:NAME (such as cl100k_base) or tiktoken:FILE, read "
        "as cl100k_base is",
    )  # fmt: skip
    parser.add_argument("--text-field", default="text", help="field of a .jsonl object (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser.parse_args(arguments)


def parse_shares(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        language, equals, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            equals = ""
        if not (language and equals) or language in shares:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid: it must be like zh=.45,en=.35,code=.2.")
        shares[language] = value
    return shares


def read_documents(
    files: Sequence[str], text_field: str, advance: Callable[[int], object]
) -> Iterator[Document | InvalidDocument]:
    """Every document of `files`; calls advance(bytes) on the way."""
    from bc2_jax.data.documents import Fields, InvalidDocument, read_span, scan_file

    fields = Fields(text=text_field)
    for file in files:
        scanned = scan_file(file, fields, 1 << 26)
        if scanned.problem is not None:
            yield InvalidDocument(scanned.problem)
        for span in scanned.spans:
            for document in read_span(span, fields):
                yield (
                    document
                    if isinstance(document, InvalidDocument)
                    else (document.text, document.language, document.weight)
                )
            advance(span.size)


def draw_sample(options: argparse.Namespace, console: Console) -> tuple[TokenizerSample, int]:
    """The sample, and how many documents were invalid; each of those is logged."""
    from bc2_jax.data.documents import InvalidDocument
    from bc2_jax.data.text_files import find_text_files
    from bc2_jax.data.tokenizer_sample import SampleDrawer

    drawer = SampleDrawer(
        options.sample_bytes,
        shares=options.shares,
        held_out_fraction=options.validation_fraction,
        held_out_bytes=options.measure_bytes,
    )
    invalid = 0
    files, skipped = find_text_files(options.inputs, "INPUT")
    for name in skipped[:20]:
        logger.warning("%s: the file is not read", name)
    if len(skipped) > 20:
        logger.warning("%d more files of the folders are not read", len(skipped) - 20)
    with Progress(
        TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=sum(file.size for file in files))
        paths = [file.path for file in files]
        for document in read_documents(paths, options.text_field, lambda size: progress.advance(task, size)):
            if isinstance(document, InvalidDocument):
                invalid += document.documents
                logger.warning("left out: %s", document.reason)
            else:
                drawer.add(*document)
    return drawer.finish(), invalid


def tabulate_sample(sample: TokenizerSample) -> Table:
    names = ("language", "documents", "bytes", "held out", "weight 0", "empty", "drawn", "drawn bytes", "share", "cut")
    table = make_table(*names, title="Documents", numbers_from=1)
    total = sum(count.drawn_bytes for count in sample.counts.values())
    for language, count in sample.counts.items():
        numbers = (
            count.documents, count.bytes, count.held_out_documents, count.unweighted_documents, count.empty_documents,
            count.drawn_documents, count.drawn_bytes,
        )  # fmt: skip
        share = f"{count.drawn_bytes / total:.1%}"
        table.add_row(language, *(f"{number:,}" for number in numbers), share, str(count.cut_documents))
    return table


def tabulate_compression(results: Sequence[Compression]) -> Table:
    names = ("tokenizer", "language", "documents", "characters", "tokens", "tokens / character", "tokens / byte")
    table = make_table(*names, title="Compression of held-out text, lower is better", numbers_from=2)
    for result in results:
        numbers = (result.documents, result.characters, result.tokens)
        rates = (f"{result.tokens_per_character:.4f}", f"{result.tokens_per_byte:.4f}")
        table.add_row(result.tokenizer, result.language, *(f"{number:,}" for number in numbers), *rates)
    return table


def report(
    options: argparse.Namespace, sample: TokenizerSample, invalid: int, text: TrainingText, sha256: str,
    checks: Sequence[Check], results: Sequence[Compression],
) -> dict[str, Any]:  # fmt: skip
    held_out = hashlib.sha256()
    for texts in sample.held_out.values():
        for document in texts:
            held_out.update(document.encode() + b"\0")
    return {
        "model": str(options.out),
        "sha256": sha256,
        "vocab_size": options.vocab_size,
        "character_coverage": options.character_coverage,
        "inputs": [str(path) for path in options.inputs],
        "sample_bytes": options.sample_bytes,
        "shares": options.shares,
        "shortfalls": sample.shortfalls(),
        "invalid_documents": invalid,
        "languages": {language: dataclasses.asdict(count) for language, count in sample.counts.items()},
        "training_text": dataclasses.asdict(text),
        "checks": [{"name": check.name, "passed": check.failure is None, "failure": check.failure} for check in checks],
        "compression": {
            "formula": FORMULA,
            "text": f"documents of the inputs, held out by a hash of their text ({options.validation_fraction:.2%})",
            "text_sha256": held_out.hexdigest(),
            "results": [
                dataclasses.asdict(result)
                | {"tokens_per_character": result.tokens_per_character, "tokens_per_byte": result.tokens_per_byte}
                for result in results
            ],
        },
    }


def run(options: argparse.Namespace, console: Console, errors: Console) -> int:
    # Imported here so that --help and a typo answer at once.
    from bc2_jax.data.tokenizer_report import check_tokenizer, measure_compression, open_encoder
    from bc2_jax.tokenizer import TrainingText, train_tokenizer

    if options.out.exists() and not (options.overwrite and options.out.is_file()):
        raise FileExistsError(f"--out = {str(options.out)!r} is not valid: it exists; choose another or --overwrite.")
    others = {name: open_encoder(name) for name in options.compare}
    sample, invalid = draw_sample(options, errors)
    console.print(tabulate_sample(sample))
    for shortfall in sample.shortfalls():
        logger.warning("too little text: %s", shortfall)
    counts = TrainingText()
    failed = options.out.with_name(f"{options.out.name}.failed")
    errors.print(f"training {options.vocab_size:,} pieces on {len(sample.texts):,} documents")
    tokenizer = train_tokenizer(
        sample.texts, failed, options.vocab_size, character_coverage=options.character_coverage, counts=counts
    )
    console.print(
        f"Trained on {counts.texts:,} documents, {counts.lines:,} lines, {counts.bytes:,} bytes; {counts.cut_lines:,} "
        f"lines above 4,096 characters were cut, {counts.removed_characters:,} characters U+2585 removed, {invalid:,} "
        f"invalid documents left out.",
    )  # fmt: skip
    checks = check_tokenizer(tokenizer, options.vocab_size, [t for texts in sample.held_out.values() for t in texts])
    for check in checks:
        passed = check.failure is None
        line = f"passed  {check.name}" if passed else f"FAILED  {check.name}: {check.failure}"
        console.print(line, style="green" if passed else "red")
    if any(check.failure for check in checks):
        errors.print(f"error: a check failed; the model is in {failed}", style="red")
    if sample.held_out:
        others = {str(options.out): open_encoder(str(failed)), **others}
        results = [
            result for name, encode in others.items() for result in measure_compression(name, encode, sample.held_out)
        ]
        console.print(tabulate_compression(results))
        console.print(f"Compression: {FORMULA}.")
    else:
        results = []
        logger.warning("compression is not measured: no document is held out; choose a larger --validation-fraction")
    result = report(options, sample, invalid, counts, tokenizer.fingerprint, checks, results)
    options.out.with_suffix(".report.json").write_text(
        json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace"
    )
    if any(check.failure for check in checks):
        return 1
    failed.replace(options.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    options = parse_arguments(argv)
    errors = log_to_stderr()
    try:
        console = make_console()
        ends = ends_at_signals("no model was written; run the same command to start again.")
        with ends, lock(options.out.with_name(f".{options.out.name}.lock"), f"--out = {str(options.out)!r}"):
            return run(options, console, errors)
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", style="red")
        return 1
