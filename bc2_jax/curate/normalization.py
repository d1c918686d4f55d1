"""The normal form of a text, in which equal texts have equal bytes.

Unicode NFC, never NFKC, which would turn Chinese full-width punctuation into ASCII. Every line end becomes a newline,
because lines are compared and the tokenizer knows no other. Invisible characters are removed: control characters except
newline and tab, zero-width characters, marks of direction, byte order marks. The joiners U+200C and U+200D stay where
they change how text looks: after Arabic and Indic letters and emoji. Also removed are spaces at the end of a line, more
than two blank lines in a row, newlines before the text and white space after it. Indentation stays, so the same rules
suit code, whose style guides allow up to two blank lines.
"""

from __future__ import annotations

import collections
import unicodedata
from collections.abc import Sequence
from typing import Any

from bc2_jax.curate.tokens import offsets_of

# In RE2's syntax: pyarrow searches with RE2, in linear time and without the interpreter's lock.
_LINE_ENDS = r"\r\n|[\r\v\f\x{85}\x{2028}\x{2029}]"
_INVISIBLE = (
    r"[\x00-\x08\x0e-\x1f\x7f-\x{84}\x{86}-\x{9f}\x{ad}\x{200b}\x{200e}\x{200f}\x{202a}-\x{202e}"
    r"\x{2060}-\x{206f}\x{feff}\x{fff9}-\x{fffb}\x{fffe}\x{ffff}]"
)
_JOINERS = r"[\x{200c}\x{200d}]"
# Arabic and related scripts, Indic and Southeast Asian scripts, emoji and their modifiers.
_JOINED = (
    r"[\x{600}-\x{8ff}\x{900}-\x{dff}\x{e00}-\x{109f}\x{1780}-\x{18af}\x{1900}-\x{1cff}\x{a840}-\x{abff}"
    r"\x{2190}-\x{21ff}\x{2600}-\x{27bf}\x{2b00}-\x{2bff}\x{fe0f}\x{11000}-\x{11fff}\x{1f000}-\x{1faff}]"
)
_WHITE = "\n \t\xa0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACES = r"[ \t\x{a0}\x{1680}\x{2000}-\x{200a}\x{202f}\x{205f}\x{3000}]"

# Rules in order: name in reports, pattern, replacement.
_REMOVALS = (
    ("line ends", _LINE_ENDS, "\n"),
    ("invisible characters", _INVISIBLE, ""),
    ("joiners", rf"({_JOINED}{_JOINERS})|{_JOINERS}", r"\1"),
)
_LAYOUT = (
    ("trailing spaces", rf"{_SPACES}+\n", "\n"),
    ("blank lines", r"\n{4,}", "\n\n\n"),
)
# A text in NFC without outer white space is normal if this does not match.
_SUSPECT = rf"{_LINE_ENDS}|{_INVISIBLE}|{_JOINERS}|{_SPACES}\n|\n\n\n\n"


def normalize_texts(texts: Sequence[str]) -> tuple[list[str], collections.Counter[str]]:
    """The normal form of each text, and the number of texts that each rule changed."""
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
    """A pyarrow LargeStringArray; `encoded` are the texts in UTF-8, if they are known."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts] if encoded is None else encoded
    offsets = offsets_of([len(text) for text in encoded])
    # Several times as fast as pa.array.
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))


def _apply(column: Any, rules: Sequence[tuple[str, str, str]], changed: collections.Counter[str]) -> Any:
    import pyarrow.compute as pc

    for name, pattern, replacement in rules:
        before = column
        column = pc.replace_substring_regex(before, pattern=pattern, replacement=replacement)
        changed[name] += pc.sum(pc.not_equal(before, column)).as_py()
    return column
