"""Licence headers: comments at the beginning of a file that it shares with thousands of others.

Two short programs under one licence have more in common in their headers than they have of their own. So documents are
compared without these, wherever there is enough else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from bc2_jax.curate.minhash import SHINGLE
from bc2_jax.curate.tokens import hash_tokens

# A header is looked for in so many characters: the GPL's is 700 long, the longest in use about 3,000.
_LONGEST = 6000
_LICENCE = re.compile(
    r"(?i)\b(?:licen[cs]ed?|copyright|copyleft|spdx|all rights reserved|without warranty|warranties|redistribution)\b|"
    r"\(c\)|©|许可|版权|著作权|ライセンス|著作権"
)
# A comment to the end of its line, blank lines among them, and a comment with a beginning and an end.
_LINES = re.compile(r"(?:[ \t]*(?:(?:#|//|--|;|%|'|!|\.\\\"|REM\b|rem\b|dnl\b).*)?(?:\n|$))+")
_BLOCK = re.compile(
    r"\s*(?:/\*.*?\*/|<!--.*?-->|\"\"\".*?\"\"\"|'''.*?'''|\(\*.*?\*\)|\{-.*?-\}|--\[\[.*?\]\])[ \t]*(?:\n|$)", re.S
)
_SHEBANG = re.compile(r"#!.*\n|<\?(?:php|xml\b[^\n]*)\s*\n|<!doctype[^\n]*\n", re.I)


def header_end(text: str) -> int:
    """Characters of the licence header at the beginning of a text, 0 if there is none.

    It is every comment up to the last of those that begin the text and name a licence or a copyright.
    """
    beginning = text[:_LONGEST]
    place = end = 0
    if found := _SHEBANG.match(beginning):
        place = found.end()
    while place < len(beginning):
        found = _BLOCK.match(beginning, place) or _LINES.match(beginning, place)
        if found is None or found.end() == place:
            break
        place = found.end()
        if _LICENCE.search(found[0]):
            end = place
    return end


def header_tokens(texts: Sequence[str]) -> np.ndarray:
    """int64 [D]: how many tokens of each text are its licence header; 0 where nothing to compare would be left."""
    ends = [header_end(text) for text in texts]
    places = [place for place, end in enumerate(ends) if end]
    counts = np.zeros(len(texts), np.int64)
    counts[places] = np.diff(hash_tokens([texts[place][: ends[place]] for place in places]).offsets)
    # The rest is counted no further than it has to be.
    rest = np.diff(hash_tokens([texts[place][ends[place] :][: 64 * SHINGLE] for place in places]).offsets)
    counts[np.array(places, int)[rest < SHINGLE]] = 0
    return counts
