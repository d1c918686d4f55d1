"""Items of benchmarks, to look for them in training data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bc2_jax.validation import choices, require


def read_items(path: Path, fields: Sequence[str] | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line, texts) of each item of a .txt file, one a line, or of a .jsonl file, one object a line, empty lines none.

    Of an object, every string in it counts, at any depth, or only what is in those of `fields` that it has. Raises
    ValueError naming a line that can't be read, or that has none of `fields`.
    """
    require(path.suffix in (".txt", ".jsonl"), "benchmarks", str(path), "legal are .txt and .jsonl")
    require(path.is_file(), "benchmarks", str(path), "it must be a file")
    with path.open("rb") as lines:
        for number, content in enumerate(lines, 1):
            try:
                line = content.decode().strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"benchmarks = {path}:{number} is not valid: it is not UTF-8.") from error
            if line:
                value = line if path.suffix == ".txt" else _parse(line, f"{path}:{number}", fields)
                yield number, list(_strings(value))


def _parse(line: str, name: str, fields: Sequence[str] | None) -> object:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"benchmarks = {name} is not valid: it is not JSON ({error}).") from error
    if fields is None:
        return value
    found = [value[field] for field in fields if field in value] if isinstance(value, dict) else []
    require(bool(found), "benchmarks", name, f"it must be an object with one of the fields {choices(fields)}")
    return found


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
