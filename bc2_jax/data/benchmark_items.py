"""Items of benchmarks, to look for them in training data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from bc2_jax.data.records import Invalid, LineReader, read_text
from bc2_jax.validation import choices, require


def read_items(path: Path, fields: Sequence[str] | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line, texts) of each item of a benchmark: a line of a .txt file or an object of a .jsonl file.

    Of an object every string counts, at any depth, or only what is in those of `fields` that it has. Raises ValueError
    naming a line that is unreadable, or that has none of `fields`.
    """
    require(path.suffix in (".txt", ".jsonl"), "benchmarks", str(path), "legal are .txt and .jsonl")
    require(path.is_file(), "benchmarks", str(path), "it must be a file")
    with path.open("rb") as file:
        if path.suffix == ".txt":
            text = read_text(file, str(path))
            if isinstance(text, Invalid):
                raise ValueError(f"benchmarks = {text} is not valid.")
            lines = enumerate(map(str.strip, text.split("\n")), 1)
            yield from ((number, [line]) for number, line in lines if line)
            return
        for record in chain.from_iterable(LineReader(file.read, str(path))):
            if isinstance(record, Invalid):
                raise ValueError(f"benchmarks = {record.where} is not valid: {record.reason}.")
            value = record.value
            if fields is not None:
                value = [value[field] for field in fields if field in value] if isinstance(value, dict) else []
                legal = f"it must be an object with one of the fields {choices(fields)}"
                require(bool(value), "benchmarks", record.where, legal)
            yield record.line, list(_strings(value))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
