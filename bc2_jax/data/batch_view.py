"""Showing batches: each row as text by segment, for a terminal or as an HTML page."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from rich.text import Text

from bc2_jax.data.batch import IGNORED, Rows
from bc2_jax.kernels.segments import branch_of, trunk_of
from bc2_jax.tokenizer import Tokenizer

_COLOURS = ("green", "cyan")
_FIRST = 12
"""Entries of each array shown as numbers."""
# Control characters of the text must not reach the terminal.
_VISIBLE = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {i: 0xFFFD for i in range(0x7F, 0xA0)}


@dataclasses.dataclass(frozen=True)
class Run:
    """Input tokens shown together: one token, the bytes of characters, or a stretch of padding."""

    text: str
    start: int
    stop: int
    segment: int
    """segment_ids of the tokens (`kernels.segments`); 0 is padding."""
    ignored: bool
    """Whether the tokens have no target."""
    special: bool


def read_runs(row: Rows, tokenizer: Tokenizer) -> Iterator[Run]:
    """The runs of one row, whose fields are int32 [T]."""
    ids, segments = row["input_ids"].tolist(), row["segment_ids"].tolist()
    ignored = (row["labels"] == IGNORED).tolist()

    def is_joined(left: int, right: int) -> bool:
        same = segments[left] == segments[right] and ignored[left] == ignored[right]
        return same and (segments[left] == 0 or (tokenizer.is_byte(ids[left]) and tokenizer.is_byte(ids[right])))

    start = 0
    while start < len(ids):
        stop = start + 1
        while stop < len(ids) and is_joined(stop - 1, stop):
            stop += 1
        special = tokenizer.is_special(ids[start])
        text = tokenizer.piece(ids[start]) if special else tokenizer.decode(ids[start:stop])
        if stop - start > 1 and special:
            text += f" x {stop - start}"
        yield Run(text, start, stop, segments[start], ignored[start], special)
        start = stop


def row_title(row: Rows) -> str:
    """A one-line summary of a row."""
    targets, tokens = int((row["labels"] != IGNORED).sum()), int((row["segment_ids"] > 0).sum())
    return (
        f"{len(_segments(row))} segments, {tokens:,} tokens, {targets:,} targets, {tokens - targets:,} "
        f"tokens without, {len(row['labels']) - tokens:,} padding"
    )


def _segments(row: Rows) -> list[int]:
    """The segments of a row in order, without padding."""
    return [segment for segment in dict.fromkeys(row["segment_ids"].tolist()) if segment]


def segment_name(segment: int) -> str:
    """The number of a document, and of its branch: 3, 3.1, 3.2."""
    branch = branch_of(segment)
    return f"{trunk_of(segment)}.{branch}" if branch else str(segment)


def _colour(segment: int) -> int:
    """0 or 1, alternating over documents and over branches."""
    return (trunk_of(segment) + branch_of(segment)) % 2


def row_arrays(row: Rows) -> str:
    """The first entries of each array, one array a line."""

    def show(name: str, value: int) -> str:
        return segment_name(value) if name == "segment_ids" else str(value)

    lines = (f"{name:<12}" + " ".join(f"{show(name, v):>6}" for v in row[name][:_FIRST].tolist()) for name in row)
    return "\n".join(lines)


def _segment_title(row: Rows, segment: int) -> str:
    here = row["segment_ids"] == segment
    if segment == 0:
        return f"padding, {int(here.sum()):,} tokens"
    positions = row["positions"][here]
    targets = int((row["labels"][here] != IGNORED).sum())
    return f"segment {segment_name(segment)}, positions {positions[0]}..{positions[-1]}, {targets:,} targets"


def read_answers(row: Rows, segment: int, tokenizer: Tokenizer) -> list[str]:
    """The targets of a segment of a conversation as texts, special tokens spelt out; none for a document, in which all
    tokens but the first are targets."""
    labels = row["labels"][row["segment_ids"] == segment]
    is_target = labels != IGNORED
    is_document = branch_of(segment) == 0 and np.count_nonzero(~is_target) <= 1
    if segment == 0 or is_document:
        return []
    stretches = np.split(labels, np.flatnonzero(np.diff(is_target)) + 1)
    return [_spell(stretch.tolist(), tokenizer) for stretch in stretches if stretch[0] != IGNORED]


def _spell(ids: list[int], tokenizer: Tokenizer) -> str:
    stretches = ((special, list(here)) for special, here in itertools.groupby(ids, tokenizer.is_special))
    return "".join(
        "".join(map(tokenizer.piece, ids)) if special else tokenizer.decode(ids) for special, ids in stretches
    )


def render_row(row: Rows, tokenizer: Tokenizer) -> Text:
    """A row for a terminal: segments in alternating colours with headings, special tokens spelt out, tokens without a
    target dim; below a conversation its targets."""
    text = Text()
    for segment, runs in itertools.groupby(read_runs(row, tokenizer), lambda run: run.segment):
        text.append("\n" * bool(text) + f"[{_segment_title(row, segment)}]\n", "bold")
        for run in runs:
            colour = "magenta" if run.special else _COLOURS[_colour(segment)]
            text.append(run.text.translate(_VISIBLE), f"dim {colour}" if run.ignored else colour)
        for answer in read_answers(row, segment, tokenizer):
            text.append("\n[targets] ", "bold")
            text.append(answer.translate(_VISIBLE))
    return text


_PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>Batches</title><style>
body {{ font: 15px/1.5 sans-serif; margin: 2em; max-width: 80em }}
.row, .arrays {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: .5em }}
.arrays {{ font-family: monospace; overflow-x: auto; white-space: pre }}
.s0 {{ background: #e3f0ff }} .s1 {{ background: #e6f5df }} .pad {{ background: #eee }}
.special {{ color: #a0118c; font-weight: bold }} .ignored {{ opacity: .55 }}
.row span:hover {{ outline: 1px solid #333 }}
</style></head><body>
<p>Each token shows its id, label, segment and position under the pointer. Segments have alternating colours; tokens
without a target (label {ignored}) are pale.</p>
{rows}
</body></html>
"""


def render_html(rows: Iterable[tuple[str, Rows]], tokenizer: Tokenizer) -> str:
    """A self-contained page of (name, row) pairs."""
    parts = []
    for name, row in rows:
        parts.append(f"<h3>{html.escape(name)}: {row_title(row)}</h3>\n<div class=arrays>{row_arrays(row)}</div>")
        parts.append(f"<div class=row>{''.join(_html_run(run, row) for run in read_runs(row, tokenizer))}</div>")
        for segment in _segments(row):
            for answer in read_answers(row, segment, tokenizer):
                shown = html.escape(answer.translate(_VISIBLE))
                parts.append(f"<div class=row>targets of segment {segment_name(segment)}: <b>{shown}</b></div>")
    return _PAGE.format(ignored=IGNORED, rows="\n".join(parts))


def _html_run(run: Run, row: Rows) -> str:
    classes = ["pad" if run.segment == 0 else f"s{_colour(run.segment)}"]
    classes += ["special"] * run.special + ["ignored"] * run.ignored
    # All tokens of a stretch of padding are alike.
    shown = slice(run.start, run.stop if run.segment else run.start + 1)
    title = "; ".join(
        f"{name} {' '.join(map(show, np.asarray(row[key])[shown].tolist()))}"
        for name, key, show in (
            ("id", "input_ids", str),
            ("label", "labels", str),
            ("segment", "segment_ids", segment_name),
            ("position", "positions", str),
        )
    )
    text = html.escape(run.text.translate(_VISIBLE))
    return f'<span class="{" ".join(classes)}" title="{title}">{text}</span>'
