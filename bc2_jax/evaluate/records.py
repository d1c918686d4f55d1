"""What is kept of every item that a model was asked: one JSON object a line, added as soon as it is known."""

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
"""Of every item: id, group, prompt (as it was asked), dropped_shots, header_dropped, cut (tokens left out at its
beginning), answers and right by way of scoring, and near_tie.

Of one with choices: choices and log_probs, for letters bare and bare_log_probs, gold (indices), fallback (whether a
token reaches across the border of prompt and choice). Of one that was generated: text, reason, tokens, most_tokens,
target, of code why, of texts that a judge of the user has seen judge (`judging.name_judge`)."""


class RecordFile:
    """The records of one benchmark in a JSON Lines file; a last line that was not written to its end is left out."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, naming the line, for a file that holds anything else."""
        self.path = path
        self.records = {record["id"]: record for record in read_records(path)} if path.is_file() else {}

    def __contains__(self, item: str) -> bool:
        return item in self.records

    def add(self, found: Iterable[Record]) -> None:
        """Keeps records, on disk when it returns; one of an item that has one already replaces it."""
        found = list(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(self.path, b"".join(map(_line, found)))
        self.records |= {record["id"]: record for record in found}

    def put_in_order(self, items: Sequence[str]) -> None:
        """Rewrites the file: one line an item, in the order of `items`, then those that are not among them."""
        places = {item: place for place, item in enumerate(items)}
        self.records = dict(sorted(self.records.items(), key=lambda pair: places.get(pair[0], len(places))))
        with replaced(self.path) as partial:
            partial.write_bytes(b"".join(map(_line, self.records.values())))


def _line(record: Record) -> bytes:
    # No NaN: a record with one would be of a model that is broken, and no JSON.
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_records(path: Path) -> list[Record]:
    """The records of a file, without a last line that was cut off. Raises ValueError, naming the line, for others."""
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
    """The same records as a Parquet file; `right` and `answers` become columns of their own. Needs pyarrow."""
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
    """An example and how it was answered, for `Task.summarize`; of letters, `letter` is the way that leads."""
    right: Mapping[str, bool] = record["right"]
    answers: Mapping[str, str] = record["answers"]
    if letter in right:
        right = {letter: right[letter], **right}
    leading = letter if letter in answers else next(iter(answers), None)
    return Judged(example, right, answers.get(leading, "") if leading else "", record.get("text", ""))


def gold_log_prob(record: Record) -> float | None:
    """The log-probability (nats) of the right choice, the likeliest where there are several; None without choices."""
    if not record.get("gold") or "log_probs" not in record:
        return None
    return max(record["log_probs"][place] for place in record["gold"])


def is_finite(record: Record) -> bool:
    """Whether a model that works can have given the record."""
    return all(map(math.isfinite, [*record.get("log_probs", ()), *record.get("bare_log_probs", ())]))
