"""Paragraphs and sentences: their places and hashes, and how copies are cut out (paper section 2.1).

A paragraph ends at a blank line, at a line end after the end of a sentence, and after a short line, such as a heading.
So a sentence that is wrapped over several lines stays in one paragraph, and a page with one paragraph a line has one
for each line. A sentence ends after a full stop, a question mark or an exclamation mark, and the quotes and brackets
that close after it; a Latin full stop needs a space after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.curate.tokens import CodePoints, code_points, hash_values, pieces

PARAGRAPH, SENTENCE = 0, 1
_NEWLINE = 10
_ENDS = "。！？!?…"
_STOPS = ".;；:："  # end a paragraph at a line end, and a sentence before a space
_CLOSERS = "\"'”’」』）)】》"
# A line of fewer columns was not wrapped; ideographs have two columns.
_WRAPPED_WIDTH = 45
_FIRST_WIDE = 0x2E80
_OTHER, _END, _STOP, _CLOSER, _SPACE, _LINE = range(6)


class Spans(NamedTuple):
    """Paragraphs and sentences of some documents, in order; arrays of equal length."""

    document: np.ndarray
    """int32: index of the document."""
    start: np.ndarray
    """int32: the first character."""
    stop: np.ndarray
    """int32: one past the last character."""
    hash: np.ndarray
    """int64: of its characters."""
    kind: np.ndarray
    """int8: PARAGRAPH or SENTENCE."""


def find_spans(texts: Sequence[str], shortest_paragraph: int, shortest_sentence: int) -> Spans:
    """All paragraphs and sentences of at least these lengths in characters, without outer white space; 0 lists none.

    A sentence that is a whole paragraph is listed once, as the paragraph.
    """
    parts: list[Spans] = []
    done = 0
    for piece in pieces(texts):
        spans = _find(code_points(piece), shortest_paragraph, shortest_sentence)
        parts.append(spans._replace(document=spans.document + np.int32(done)))
        done += len(piece)
    if not parts:
        parts = [_find(code_points([]), shortest_paragraph, shortest_sentence)]
    return Spans(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def cut_spans(text: str, starts: Sequence[int], stops: Sequence[int]) -> str:
    """`text` without the stretches, which are sorted by start, and without the blank lines that they would leave."""
    kept = [""]
    position = 0
    for start, stop in zip(starts, stops, strict=True):
        if start > position or not position:
            _append(kept, text[position:start], position > 0)
        position = max(position, stop)
    _append(kept, text[position:], position > 0)
    return "".join(kept)


def _append(kept: list[str], after: str, cut: bool) -> None:
    """Adds the next part; at a cut, without the spaces and blank lines that the cut would leave."""
    if not cut:
        kept.append(after)
        return
    while len(kept) > 1 and not kept[-1].rstrip(" \t"):
        before = kept.pop()
        kept[-1] += before
    before = kept[-1]
    head, tail = before.rstrip(" \t"), after.lstrip(" \t")
    begins_line, ends_line = not head or head.endswith("\n"), not tail or tail.startswith("\n")
    if begins_line and ends_line:
        first, last = head.rstrip("\n"), tail.lstrip("\n")
        breaks = max(len(head) - len(first), len(tail) - len(last))
        first_of_all = not first and len(kept) == 1
        kept[-1:] = [first, "" if first_of_all else "\n" * breaks, last]
    elif begins_line or ends_line:
        kept[-1:] = [head, tail]
    else:
        kept[-1:] = [head, " " if head != before or tail != after else "", tail]


@functools.cache
def _classes() -> np.ndarray:
    """uint8 [0x110000]: the role of each character at the end of a sentence."""
    classes = np.zeros(0x110000, np.uint8)
    for characters, kind in ((_ENDS, _END), (_STOPS, _STOP), (_CLOSERS, _CLOSER), (" \t\u3000\u00a0", _SPACE)):
        classes[[ord(c) for c in characters]] = kind
    classes[_NEWLINE] = _LINE
    return classes


def _find(points: CodePoints, shortest_paragraph: int, shortest_sentence: int) -> Spans:
    values, offsets = points
    kinds = _classes()[values]
    size = len(values)
    first, last = offsets[:-1], offsets[1:]
    newline = kinds == _LINE
    before = np.empty(size, np.uint8)
    before[1:], before[:1] = kinds[:-1], _LINE
    after = np.empty(size, np.uint8)
    after[:-1], after[-1:] = kinds[1:], _LINE
    # The end of a document ends its last paragraph and sentence.
    before[first[first < last]] = _LINE
    after[last[first < last] - 1] = _LINE

    ended = (before == _END) | (before == _STOP) | (before == _CLOSER) | (before == _LINE)
    ends_paragraph = newline & (ended | (after == _LINE))
    ends_paragraph[_short_line_ends(points, newline)] = True
    # After the end mark, or after the last of the closers that follow it.
    more = (after == _CLOSER) | (after == _END)
    closes = (kinds == _END) | ((kinds == _STOP) & ((after == _SPACE) | (after == _LINE) | (after == _CLOSER)))
    quoted = (kinds == _CLOSER) & ((before == _END) | (before == _STOP))
    ends_sentence = (closes | quoted) & ~more

    boundary = np.zeros(size + 1, bool)
    boundary[offsets] = True
    boundary[1:] |= ends_paragraph
    paragraphs = _stretches(points, kinds, np.flatnonzero(boundary), shortest_paragraph, PARAGRAPH)
    boundary[1:] |= ends_sentence
    sentences = _stretches(points, kinds, np.flatnonzero(boundary), shortest_sentence, SENTENCE)
    whole = np.isin(sentences.start, paragraphs.start)
    whole[whole] = sentences.stop[whole] == paragraphs.stop[np.searchsorted(paragraphs.start, sentences.start[whole])]
    sentences = Spans(*(column[~whole] for column in sentences))
    both = Spans(*(np.concatenate(columns) for columns in zip(paragraphs, sentences, strict=True)))
    order = np.argsort(both.start, kind="stable")
    document = both.document[order]
    origin = offsets[document].astype(np.int32)
    return Spans(document, both.start[order] - origin, both.stop[order] - origin, both.hash[order], both.kind[order])


def _short_line_ends(points: CodePoints, newline: np.ndarray) -> np.ndarray:
    """Places of the newlines after lines that were not wrapped."""
    ends = np.flatnonzero(newline)
    width = np.zeros(len(newline) + 1, np.int32)
    np.cumsum(1 + (points.values >= _FIRST_WIDE), dtype=np.int32, out=width[1:])
    # A line begins after a newline or with a document.
    begins = np.union1d(ends + 1, points.offsets)
    begin = begins[np.searchsorted(begins, ends, side="right") - 1]
    return ends[width[ends] - width[begin] < _WRAPPED_WIDTH]


def _stretches(points: CodePoints, kinds: np.ndarray, edges: np.ndarray, shortest: int, kind: int) -> Spans:
    """The stretches between edges, without outer white space, if they are long enough; places in the whole piece."""
    values, offsets = points
    blank = (kinds == _SPACE) | (kinds == _LINE)
    # The first visible character after an edge, and the last one before the next edge.
    solid = np.flatnonzero(~blank)
    low, high = np.searchsorted(solid, edges[:-1]), np.searchsorted(solid, edges[1:])
    keep = high > low
    low, high = low[keep], high[keep]
    start, stop = solid[low], solid[high - 1] + 1
    keep = (stop - start >= shortest) & (shortest > 0)
    start, stop = start[keep], stop[keep]
    document = np.searchsorted(offsets, start, side="right") - 1
    hashes = hash_values(values, start, stop).view(np.int64)
    return Spans(
        document.astype(np.int32), start.astype(np.int32), stop.astype(np.int32), hashes,
        np.full(len(start), kind, np.int8),
    )  # fmt: skip
