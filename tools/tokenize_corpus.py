"""Text files -> packed rows for training.

    python tools/tokenize_corpus.py corpus/*.jsonl --tokenizer tokenizer.model --sequence-length 4096 --out rows/web

Inputs are .jsonl (one object a line, the text in its field `text`), .txt (one document a file), or folders of them. OUT
becomes a source for `DataConfig`: rows of T + 1 tokens, some documents held out for validation, and manifest.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from bc2_jax.data.packing import InvalidDocument, Manifest, pack_documents, why_invalid
from bc2_jax.tokenizer import Tokenizer

_SUFFIXES = (".jsonl", ".txt")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files of `inputs` in their order; a folder stands for the files below it, sorted by path."""
    files: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"INPUT = {str(path)!r} does not exist.")
        found = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES) if path.is_dir() else [path]
        if not found or found[0].suffix not in _SUFFIXES:
            raise ValueError(
                f"INPUT = {str(path)!r} is not valid: it must be .jsonl, .txt or a folder with such files."
            )
        files += found
    return files


def read_documents(
    files: Sequence[Path], text_field: str, advance: Callable[[int], object]
) -> Iterator[str | InvalidDocument]:
    """Yields every document; one that can't be read is named by file and line. Calls advance(bytes) on the way."""
    for file in files:
        if file.suffix == ".txt":
            content = file.read_bytes()
            yield _decode(content, str(file))
            advance(len(content))
        else:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield _parse(line, text_field, f"{file}:{number}")
                    advance(len(line))


def _decode(content: bytes, where: str) -> str | InvalidDocument:
    try:
        return content.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        return InvalidDocument(f"{where}: it is not UTF-8 ({error.reason} at byte {error.start})")


def _parse(line: bytes, text_field: str, where: str) -> str | InvalidDocument:
    text = _decode(line, where)
    if isinstance(text, InvalidDocument):
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        return InvalidDocument(f"{where}: it is not JSON ({error})")
    if not isinstance(value, dict) or text_field not in value:
        return InvalidDocument(f"{where}: it is no object with a field {text_field!r}")
    reason = why_invalid(value[text_field])
    return InvalidDocument(f"{where}: in field {text_field!r}, {reason}") if reason else value[text_field]


def summarize(manifest: Manifest) -> Table:
    """The counts of a manifest as a table."""
    table = Table("", "documents", "tokens", "tokens / character", "rows", "padding", "files")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        rate = f"{split.tokens / split.characters:.3f}" if split.characters else "-"
        counts = (split.documents, split.tokens, rate, split.rows, split.padding, len(split.files))
        table.add_row(name, *(count if isinstance(count, str) else f"{count:,}" for count in counts))
    return table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--sequence-length", type=int, default=4096, help="T, tokens a row (default %(default)s)")
    parser.add_argument("--text-field", default="text", help="field of a .jsonl object (default %(default)s)")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of documents held out (default %(default)s)"
    )
    parser.add_argument("--rows-per-file", type=int, default=65_536, help="rows a file (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it has packed rows")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        files = find_files(options.inputs)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=sum(file.stat().st_size for file in files))
            manifest = pack_documents(
                read_documents(files, options.text_field, lambda size: progress.advance(task, size)),
                Tokenizer(options.tokenizer),
                options.out,
                options.sequence_length,
                validation_fraction=options.validation_fraction,
                rows_per_file=options.rows_per_file,
                overwrite=options.overwrite,
            )
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    Console().print(summarize(manifest))
    print(
        f"{manifest.documents:,} documents read, {manifest.empty_documents:,} empty, {manifest.invalid_documents:,} "
        f"invalid; written to {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
