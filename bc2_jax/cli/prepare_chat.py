"""Conversations -> packed rows for fine-tuning; preference pairs -> packed rows for preference tuning.

    bc2 prepare-chat DATA... --tokenizer Baichuan2-7B-Base --out ROWS
    bc2 train baichuan2_7b_chat --init-from Baichuan2-7B-Base --data.sources.0.path ROWS

    bc2 prepare-chat DATA... --pairs --tokenizer Baichuan2-7B-Chat --out PAIRS
    bc2 train baichuan2_7b_dpo --init-from Baichuan2-7B-Chat --data.sources.0.path PAIRS

DATA are .jsonl, .ndjson, .json (plain, .zst or .gz) and .parquet files and folders of them, in any of these formats:
the released one and ShareGPT (conversations: [{from, value}]), OpenAI messages ([{role, content}]), Alpaca
(instruction, input, output), prompt and completion, preference pairs ([prompt,] chosen, rejected; without --pairs the
chosen answer is trained on).

ROWS becomes a source for `DataConfig`: rows of --row-length tokens, each with as many whole samples as fit, and
questions.jsonl with the conversations that are held out, or pairs.jsonl with the pairs. What can't be used is left out
and listed by file and line in ROWS/problems.txt, as is every sample that was cut. ROWS appears when it is complete.

A pair is in one row: the prompt once, then both answers. How much better the chosen one is may stand beside them as
margin, or as score_chosen and score_rejected; other fields are kept in pairs.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bc2_jax.align.preparation_settings import Conversations, RowSettings
from bc2_jax.align.row_preparation import PAIRS, PROBLEMS, QUESTIONS, prepare_chat, prepare_pairs
from bc2_jax.data.processes import ends_at_signals, num_cores
from bc2_jax.terminal import local_path, log_to_stderr, make_console, make_table, use_utf8

_FILES_SHOWN = 20


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = RowSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=local_path, metavar="DATA")
    parser.add_argument(
        "--tokenizer", required=True, type=local_path, help="SentencePiece model, or a model's folder or run"
    )
    parser.add_argument("--out", required=True, type=local_path, metavar="ROWS", help="folder to make")
    parser.add_argument(
        "--max-length", type=int, default=default.max_length, metavar="N",
        help="tokens of the longest sample; of a pair those of the prompt with the longer answer (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--row-length", type=int, metavar="T", help="tokens of a row (default: --max-length)")
    parser.add_argument("--pairs", action="store_true", help="rows of preference pairs, not of conversations")
    parser.add_argument(
        "--truncation", choices=("rounds", "right", "drop"), default=default.truncation,
        help="of a longer conversation: leave out its oldest rounds, and cut what is still too long (rounds, the "
        "default); cut its end, as the released script does (right); leave it out (drop)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-fraction", type=float, default=default.validation_fraction, metavar="F",
        help="share of samples held out, at least one unless 0 (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--max-invalid", type=int, metavar="N", help="stop at more records that can't be used")
    parser.add_argument("--processes", type=int, default=num_cores(), help="default: one a core, %(default)s here")
    parser.add_argument("--rows-per-file", type=int, default=default.rows_per_file, help="(default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace ROWS if it has packed rows")
    return parser.parse_args(arguments)


def find_model(path: Path) -> Path:
    if not path.is_dir():
        return path
    from bc2_jax.convert.pretrained import find_tokenizer  # which imports JAX

    return find_tokenizer(path)


def print_tables(console: Console, counts: Conversations, of_pairs: bool) -> None:
    """What each file holds, and what became of all of it."""
    files = make_table("file", "format", "samples", "can't be used", title="Read", numbers_from=2)
    for file in counts.files[:_FILES_SHOWN]:
        formats = ", ".join(file.formats) or "none"
        files.add_row(file.path, formats, f"{sum(file.formats.values()):,}", f"{file.invalid:,}")
    for name, shown in (("more files", counts.files[_FILES_SHOWN:]), ("all files", counts.files)):
        if shown and len(counts.files) > 1:
            samples = sum(sum(file.formats.values()) for file in shown)
            formats = ", ".join(dict.fromkeys(form for file in shown for form in file.formats))
            label = f"{len(shown):,} {name}" if shown is not counts.files else name
            files.add_row(label, formats, f"{samples:,}", f"{sum(file.invalid for file in shown):,}")
    console.print(files)

    table = make_table("", "", "share", title="Prepared", numbers_from=1)

    def add(name: str, number: int, of: int | None = None) -> None:
        table.add_row(name, f"{number:,}", "" if of is None else f"{number / max(of, 1):.2%}")

    lost = sum(counts.invalid.values()) + sum(counts.dropped.values())
    records = counts.samples + lost
    add("records", records)
    for reason, number in [*counts.invalid.items(), *counts.dropped.items()]:
        add(f"  left out: {reason}", number, records)
    if counts.unanswered:
        add("  last user message left out: no answer", counts.unanswered, records)
    add("pairs" if of_pairs else "samples", counts.samples, records)
    if counts.margins:
        add("  of a known margin", counts.margins, counts.samples)
    elif counts.pairs and not of_pairs:
        add("  preference pairs, trained on the chosen answer", counts.pairs, counts.samples)
    add("  held out", counts.held_out, counts.samples)
    add("  without their oldest rounds", counts.shortened, counts.samples)
    add("  cut on the right", counts.cut, counts.samples)
    add("rounds left out", counts.dropped_rounds)
    add("turns", counts.turns)
    add("tokens", counts.tokens)
    add("  targets", counts.targets, counts.tokens)
    add("  cut off, beside these", counts.cut_tokens, counts.tokens + counts.cut_tokens)
    add("rows", counts.rows)
    add("padding", counts.padding, counts.rows * counts.settings.inputs)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    options = parse_arguments(argv)
    console = log_to_stderr()
    begin = time.perf_counter()
    try:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        advice = "nothing was written; run the same command again."
        with ends_at_signals(advice), Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("reading", total=None)
            counts = (prepare_pairs if options.pairs else prepare_chat)(
                options.data,
                find_model(options.tokenizer),
                options.out,
                RowSettings(
                    max_length=options.max_length,
                    row_length=options.row_length,
                    validation_fraction=options.validation_fraction,
                    truncation=options.truncation,
                    rows_per_file=options.rows_per_file,
                    max_invalid=options.max_invalid,
                ),
                processes=options.processes,
                overwrite=options.overwrite,
                advance=lambda stage, done: progress.update(task, description=f"{stage} {done:,}"),
            )
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"error: {error}", style="red")
        return 1
    seconds = time.perf_counter() - begin
    print_tables(make_console(), counts, options.pairs)
    size = sum(file.size for file in counts.files) / 1e6
    listed = f" (what was left out or cut: {options.out / PROBLEMS})" if (options.out / PROBLEMS).is_file() else ""
    print(f"{size:,.1f} MB read in {seconds:.1f} s; written to {options.out}{listed}")
    if counts.held_out and options.pairs:
        print(f"held-out pairs, for bc2 reward-report: {options.out / PAIRS}")
    elif counts.held_out:
        print(f"held-out questions, which a run on these rows asks at its evaluations: {options.out / QUESTIONS}")
    return 0
