"""Text -> the one form in which the same text has the same bytes.

Unicode NFC, never NFKC, which would turn Chinese full-width punctuation into ASCII. Every line end becomes a newline,
because lines are compared and the tokenizer knows no other. What cannot be seen goes: control characters but newline
and tab, zero-width characters, marks of direction, byte order marks. The joiners U+200C and U+200D stay where they
change what is seen: after Arabic and Indic letters and emoji. Spaces at the end of a line, more than two blank lines in
a row, newlines before and white space after the text go. Indentation stays, so the same rules hold for code, whose
style guides ask for up to two blank lines.
"""

from __future__ import annotations

import collections
import unicodedata
from collections.abc import Sequence
from typing import Any

# In RE2's syntax: pyarrow searches with it, in linear time and without the interpreter's lock.
_LINE_ENDS = r"\r\n|[\r\v\f\x{85}\x{2028}\x{2029}]"
_INVISIBLE = (
    r"[\x00-\x08\x0e-\x1f\x7f-\x{84}\x{86}-\x{9f}\x{ad}\x{200b}\x{200e}\x{200f}\x{202a}-\x{202e}"
    r"\x{2060}-\x{206f}\x{feff}\x{fff9}-\x{fffb}\x{fffe}\x{ffff}]"
)
_JOINERS = r"[\x{200c}\x{200d}]"
# Arabic and its relatives, Indic and Southeast Asian scripts, emoji and what modifies them.
_JOINED = (
    r"[\x{600}-\x{8ff}\x{900}-\x{dff}\x{e00}-\x{109f}\x{1780}-\x{18af}\x{1900}-\x{1cff}\x{a840}-\x{abff}"
    r"\x{2190}-\x{21ff}\x{2600}-\x{27bf}\x{2b00}-\x{2bff}\x{fe0f}\x{11000}-\x{11fff}\x{1f000}-\x{1faff}]"
)
_WHITE = "\n \t\xa0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACES = r"[ \t\x{a0}\x{1680}\x{2000}-\x{200a}\x{202f}\x{205f}\x{3000}]"

# Name of the rule in reports, pattern, replacement; in this order.
_REMOVALS = (
    ("line ends", _LINE_ENDS, "\n"),
    ("invisible characters", _INVISIBLE, ""),
    ("joiners", rf"({_JOINED}{_JOINERS})|{_JOINERS}", r"\1"),
)
_LAYOUT = (
    ("trailing spaces", rf"{_SPACES}+\n", "\n"),
    ("blank lines", r"\n{4,}", "\n\n\n"),
)
# A text without outer white space in which this is not found, and which is NFC, is normal.
_SUSPECT = rf"{_LINE_ENDS}|{_INVISIBLE}|{_JOINERS}|{_SPACES}\n|\n\n\n\n"


def normalize(text: str) -> str:
    """The normal form of one text without lone surrogates; normalize(normalize(x)) == normalize(x)."""
    return normalize_texts([text])[0][0]


def normalize_texts(texts: Sequence[str]) -> tuple[list[str], collections.Counter[str]]:
    """The normal form of each text, and how many of the texts each rule changed."""
    import pyarrow.compute as pc

    result = [_strip(text) for text in texts]
    changed: collections.Counter[str] = collections.Counter()
    changed["outer white space"] = sum(len(a) != len(b) for a, b in zip(texts, result, strict=True))
    suspect = pc.match_substring_regex(large_strings(result), pattern=_SUSPECT).to_numpy(zero_copy_only=False)
    places = [
        i
        for i, text in enumerate(result)
        if suspect[i] or not (text.isascii() or unicodedata.is_normalized("NFC", text))
    ]
    if places:
        column = _apply(large_strings([result[i] for i in places]), _REMOVALS, changed)
        some = column.to_pylist()
        composed = [unicodedata.normalize("NFC", text) for text in some]
        changed["composition"] += sum(a != b for a, b in zip(some, composed, strict=True))
        for place, text in zip(places, _apply(large_strings(composed), _LAYOUT, changed).to_pylist(), strict=True):
            result[place] = _strip(text)
    return result, +changed


def _strip(text: str) -> str:
    return text.lstrip("\n").rstrip(_WHITE)


def large_strings(texts: Sequence[str], encoded: Sequence[bytes] | None = None) -> Any:
    """A pyarrow LargeStringArray. encoded: the texts in UTF-8, if they are available."""
    import numpy as np
    import pyarrow as pa

    encoded = [text.encode() for text in texts] if encoded is None else encoded
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    # Several times as fast as pa.array.
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def _apply(column: Any, rules: Sequence[tuple[str, str, str]], changed: collections.Counter[str]) -> Any:
    import pyarrow.compute as pc

    for name, pattern, replacement in rules:
        before = column
        column = pc.replace_substring_regex(before, pattern=pattern, replacement=replacement)
        changed[name] += pc.sum(pc.not_equal(before, column)).as_py()
    return column
