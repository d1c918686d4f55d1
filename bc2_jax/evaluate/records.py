"""The record of each asked item: one JSON object a line, appended as soon as it is known. Also JSON helpers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bc2_jax.evaluate.task import Example, Judged
from bc2_jax.files import append_lines, replaced

NAME = "records.jsonl"
Record = dict[str, Any]
"""All items: id, group, prompt (as asked), dropped_shots, header_dropped, cut (tokens cut from its beginning), answers
and right by way of scoring, near_tie.

With choices also: choices, log_probs, for letters bare and bare_log_probs, gold (indices), fallback (whether a token
spans the border of prompt and choice). Generated also: text, reason, tokens, most_tokens, target; for code why; with a
judge of the user judge (`judging.name_judge`)."""


class RecordFile:
    """The records of one benchmark in a JSON Lines file; an incomplete last line is ignored."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, naming the line, for a file with anything else."""
        self.path = path
        self.records = {record["id"]: record for record in read_records(path)} if path.is_file() else {}

    def __contains__(self, item: str) -> bool:
        return item in self.records

    def add(self, found: Iterable[Record]) -> None:
        """Appends records and flushes them to disk; a record replaces an earlier one of the same item."""
        found = list(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(self.path, b"".join(map(_line, found)))
        self.records |= {record["id"]: record for record in found}

    def put_in_order(self, items: Sequence[str]) -> None:
        """Rewrites the file with one line per item, in the order of `items`, then the others."""
        places = {item: place for place, item in enumerate(items)}
        self.records = dict(sorted(self.records.items(), key=lambda pair: places.get(pair[0], len(places))))
        with replaced(self.path) as partial:
            partial.write_bytes(b"".join(map(_line, self.records.values())))


def _line(record: Record) -> bytes:
    # NaN is not JSON and would mean a broken model.
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_records(path: Path) -> list[Record]:
    """The records of a file, without an incomplete last line. Raises ValueError, naming the line, for another file."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            is_whole = record.keys() >= {"id", "right"}
        except (ValueError, AttributeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"{path}:{number} is not a record of an evaluation; move the file away.")
        found.append(record)
    return found


def write_parquet(path: Path, records: Sequence[Record]) -> None:
    """The records as Parquet, with a column for each way in `right` and `answers`. Needs pyarrow."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for record in records:
        apart = {f"{name}_{way}": value for name in ("answers", "right") for way, value in record[name].items()}
        rows.append({name: value for name, value in record.items() if name not in ("answers", "right")} | apart)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    with replaced(path) as partial:
        parquet.write_table(table, partial)


def judged_of(example: Example, record: Record, letter: str = "as_shown") -> Judged:
    """An example with its result, for `Task.summarize`; for letters, `letter` is the leading way."""
    right: Mapping[str, bool] = record["right"]
    answers: Mapping[str, str] = record["answers"]
    if letter in right:
        right = {letter: right[letter], **right}
    leading = letter if letter in answers else next(iter(answers), None)
    return Judged(example, right, answers.get(leading, "") if leading else "", record.get("text", ""))


def gold_log_prob(record: Record) -> float | None:
    """The log-probability (nats) of the right choice, the likeliest if there are several; None without choices."""
    if not record.get("gold") or "log_probs" not in record:
        return None
    return max(record["log_probs"][place] for place in record["gold"])


def is_finite(record: Record) -> bool:
    """Whether all log-probabilities are finite."""
    return all(map(math.isfinite, [*record.get("log_probs", ()), *record.get("bare_log_probs", ())]))


def finite(value: Any) -> Any:
    """A JSON value with None for nan and inf, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
