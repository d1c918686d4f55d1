"""Cuts in documents that stay: lines of boilerplate, and sentences that are not language.

boilerplate  Lines that belong to a web site and not to its text, such as notices of cookies and copyright. A whole line
             is removed, and only if it is such a notice and little else: a statute on copyright, a report on a privacy
             policy and a licence use the same words in sentences of their own.
sentences    Rows of symbols, digits, repeated or lost characters and URLs in running text (in the paper 3.06 % of the
             data).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bc2_jax.curate.kinds import kind_of
from bc2_jax.curate.spans import cut_spans
from bc2_jax.curate.statistics import DIGIT, LETTER, SPACE, SYMBOL, count_kinds
from bc2_jax.curate.tokens import code_points, pieces
from bc2_jax.validation import require

PHRASES: dict[str, Any] = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
"""Lists of phrases by rule. The first phrases of boilerplate are C4's (Raffel et al. 2020, section 2.2), which removes
every line with "javascript" and drops pages of "lorem ipsum"."""
_SENTENCE = re.compile(r"[.。;；!！?？][\"'”’）)]*\s*$")
_PIECE_CHARACTERS = 1 << 20
_ENDS = [ord(c) for c in "\n。！？!?；"]
_STOP, _COLON, _SLASH, _LOST = ord("."), ord(":"), ord("/"), 0xFFFD
_PADDING = (ord("0"), ord("f"), ord("F"))
# Layout: rulers, dotted lines of tables of contents, box drawing.
_LAYOUT = [ord(c) for c in "-=~*_#.+^|─━═…·—"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoilerplateConfig:
    """Lines to remove. Phrases are found in upper and lower case."""

    phrases: tuple[str, ...] = tuple(PHRASES["boilerplate"]["phrases"])
    """A line that consists of phrases is removed."""
    notices: tuple[str, ...] = tuple(PHRASES["boilerplate"]["notices"])
    """Phrases next to which a line may have a name, if it is not a sentence."""
    around: tuple[str, ...] = tuple(PHRASES["boilerplate"]["around"])
    """Phrases that count only in a line that has one of the others."""
    min_share: float = 0.6
    """Share of a line's letters in phrases from which on it is removed."""
    min_share_notice: float = 0.25
    """The same for a line with a notice that does not end like a sentence."""
    max_characters: int = 160
    """Longer lines stay: they are paragraphs with such a phrase."""
    skip: tuple[str, ...] = ("code",)
    """Languages whose documents are not changed."""

    def __post_init__(self) -> None:
        for field in ("phrases", "notices", "around"):
            value = getattr(self, field)
            require(all(value), f"boilerplate.{field}", value, "a phrase can't be empty")
            require(not any("\n" in phrase for phrase in value), f"boilerplate.{field}", value, "one line each")
        for field in ("min_share", "min_share_notice"):
            require(0 <= getattr(self, field) <= 1, f"boilerplate.{field}", getattr(self, field), "it must be in 0..1")
        require(self.max_characters > 0, "boilerplate.max_characters", self.max_characters, "it must be positive")


class Line(NamedTuple):
    """A line that was removed."""

    document: int
    """Its index among the texts."""
    text: str


def remove_boilerplate(
    texts: Sequence[str], languages: Sequence[str], config: BoilerplateConfig
) -> tuple[list[str], list[Line]]:
    """The texts without boilerplate, and the removed lines by document and place."""
    import pyarrow as pa
    import pyarrow.compute as pc

    result = list(texts)
    removed: list[Line] = []
    chosen = [i for i, language in enumerate(languages) if language not in config.skip]
    deciding = config.phrases + config.notices
    if not deciding or not chosen:
        return result, removed
    # One automaton finds the documents with a phrase; only their lines are tested.
    pattern = _either(deciding)
    strings = pa.array([texts[i] for i in chosen], pa.large_string())
    found = pc.match_substring_regex(strings, pattern, ignore_case=True).to_numpy(zero_copy_only=False)
    decides = re.compile(pattern, re.IGNORECASE)
    notice = re.compile(_either(config.notices) or "(?!)", re.IGNORECASE)
    counted = re.compile(_either(deciding + config.around), re.IGNORECASE)

    def is_boilerplate(line: str) -> bool:
        if len(line) > config.max_characters or not decides.search(line):
            return False
        covered = sum(_letters(match.group()) for match in counted.finditer(line))
        is_notice = notice.search(line) is not None and _SENTENCE.search(line) is None
        return covered >= (config.min_share_notice if is_notice else config.min_share) * _letters(line)

    for k in np.flatnonzero(found).tolist():
        document = chosen[k]
        lines = texts[document].split("\n")
        out = [is_boilerplate(line) for line in lines]
        if any(out):
            result[document] = "\n".join(line for line, goes in zip(lines, out, strict=True) if not goes)
            removed += [Line(document, line) for line, goes in zip(lines, out, strict=True) if goes]
    return result, removed


def _either(phrases: Sequence[str]) -> str:
    """A regular expression; longer phrases first, because the first alternative that matches is taken."""
    return "|".join(map(re.escape, sorted(phrases, key=lambda phrase: (-len(phrase), phrase))))


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """Limits for a sentence; None switches a rule off. Shares are of its characters that are not spaces."""

    min_characters: int = 40
    """Sentences with fewer characters that are not spaces stay."""
    max_symbol_share: float | None = 0.6
    """Share of symbols: not letter, digit, space or punctuation of prose."""
    max_digit_share: float | None = 0.8
    """Share of digits."""
    min_letter_share: float | None = 0.05
    """Share of letters; with fewer it is a row of numbers or signs."""
    max_lost_share: float | None = 0.05
    """Share of U+FFFD, which stands for a character lost in decoding."""
    max_repeated_share: float | None = 0.5
    """Share of characters that equal the two before them, without padded numbers (0, f)."""
    max_urls: int | None = 5
    """Occurrences of ://."""
    skip: tuple[str, ...] = ("code",)
    """Languages whose documents are not changed."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name.endswith("_share"):
                value = getattr(self, field.name)
                legal = "it must be in 0..1, or None"
                require(value is None or 0 <= value <= 1, f"sentences.{field.name}", value, legal)
        for name in ("min_characters", "max_urls"):
            value = getattr(self, name)
            require(value is None or value > 0, f"sentences.{name}", value, "it must be positive")


def low_quality_spans(
    texts: Sequence[str], languages: Sequence[str], config: SentenceConfig
) -> list[list[tuple[int, int]]]:
    """For each document the (start, end) of its sentences to cut, in characters, ascending and not adjacent.

    A sentence ends at a newline, at 。！？；!? or at a full stop before white space. Nothing is cut if the rest is not
    running text, or less than a quarter of the document: rows of a table and formulas have few letters.
    """
    spans: list[list[tuple[int, int]]] = [[] for _ in texts]
    chosen = [i for i, language in enumerate(languages) if language not in config.skip]
    done = 0
    for piece in pieces([texts[i] for i in chosen], _PIECE_CHARACTERS):
        for document, start, end in _piece_spans(piece, config):
            into = spans[chosen[done + document]]
            if into and into[-1][1] == start:
                start = into.pop()[0]
            into.append((start, end))
        done += len(piece)
    for document, found in enumerate(spans):
        if found:
            rest = cut_spans(texts[document], *zip(*found, strict=True))
            if 4 * len(rest) < len(texts[document]) or kind_of(rest, languages[document]) != "prose":
                spans[document] = []
    return spans


def _piece_spans(texts: Sequence[str], config: SentenceConfig) -> list[tuple[int, int, int]]:
    points, offsets = code_points(texts)
    if not len(points):
        return []
    begins = np.zeros(len(points) + 1, bool)
    after = begins[1:]
    for end in _ENDS:
        after |= points == end
    after[:-1] |= (points[:-1] == _STOP) & (points[1:] <= 0x20)
    begins[offsets[:-1]] = True
    starts = np.flatnonzero(begins[:-1])
    bounds = np.append(starts, len(points))
    counts = count_kinds(points, starts)
    visible = np.diff(bounds) - counts[SPACE]
    bad = np.zeros(len(starts), bool)
    for kind, limit in ((SYMBOL, config.max_symbol_share), (DIGIT, config.max_digit_share)):
        if limit is not None:
            bad |= counts[kind] > limit * visible
    if config.min_letter_share is not None:
        bad |= counts[LETTER] < config.min_letter_share * visible
    if config.max_lost_share is not None:
        bad |= _count(points == _LOST, bounds) > config.max_lost_share * visible
    if config.max_urls is not None:
        schemes = np.zeros(len(points), bool)
        schemes[:-2] = (points[:-2] == _COLON) & (points[1:-1] == _SLASH) & (points[2:] == _SLASH)
        bad |= _count(schemes, bounds) > config.max_urls
    if config.max_repeated_share is not None:
        bad |= _count_repeated(points, bounds) > config.max_repeated_share * visible
    bad &= visible >= config.min_characters
    chosen = np.array([s for s in np.flatnonzero(bad) if not _is_layout(points[bounds[s] : bounds[s + 1]])], np.int64)
    documents = np.searchsorted(offsets, bounds[chosen], side="right") - 1
    return [
        (int(d), int(bounds[s] - offsets[d]), int(bounds[s + 1] - offsets[d]))
        for d, s in zip(documents, chosen, strict=True)
    ]


def _count(chosen: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    return np.diff(np.searchsorted(np.flatnonzero(chosen), bounds))


def _count_repeated(points: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64 [S]: characters of each sentence that equal the two before them, without white space and padding."""
    same = points[1:] == points[:-1]
    places = np.flatnonzero(same[1:] & same[:-1]) + 2
    values = points[places]
    counted = values > 0x20
    for padding in _PADDING:
        counted &= values != padding
    return np.diff(np.searchsorted(places[counted], bounds))


def _is_layout(points: np.ndarray) -> bool:
    visible = points[(points > 0x20) & (points != 0x3000)]
    return bool(np.isin(visible, _LAYOUT).mean() > 0.5)
