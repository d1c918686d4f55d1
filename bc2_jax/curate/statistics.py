"""Counts that the heuristics judge: kinds of characters, lines, stop words and repetition of each document.

Repetition is a share of tokens, not of characters as in Gopher's rules (Rae et al. 2021, Appendix A1.1); for Chinese,
whose tokens are characters, that is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from bc2_jax.curate.tokens import Tokens, choose_tokens, code_points, hash_ngrams, hash_tokens, mix, offsets_of

DIGIT, SPACE, SYMBOL, HAN, SUSPECT, LETTER = range(6)
# One gather counts all six kinds in ten bits each, so stretches have fewer than 1024 characters.
_BITS = 10
_STRETCH = 1 << 9
# Punctuation of prose. Other characters are symbols, but for letters, marks, digits and spaces.
_PROSE = ".,;:!?'\"()-–—‘’“”…、。，；：！？「」『』《》〈〉（）【】〔〕·～﹏￥$%&/"
_HAN = ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_BULLETS = "-*+•●○■□◆◇▪▫‣⁃·–—※★☆►▶"
_NEWLINE = ord("\n")
_BUCKETS = 0xC2B2AE3D27D4EB4F  # multiplies keys to choose their buckets
# Continuation bytes of UTF-8 as Latin-1 and Windows-1252 show them.
_TRAIL = "[\x80-\xbf" + re.escape(bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")) + "]"
# Begins with a class of first characters, because such a search is fast, then what must follow each of them.
_GARBLED = re.compile(
    "[\ufffd锟烫屯锛銆鐨鈥\x80-\x84\x86-\x9f\xc2-\xf4](?:"
    "(?<=[\ufffd锛銆鐨鈥\x80-\x84\x86-\x9f])"  # lost; UTF-8 punctuation and 的 read as GBK; control characters
    "|(?<=锟)斤拷?"  # U+FFFD in UTF-8, read as GBK
    "|(?<=烫)烫{2,}|(?<=屯)屯{2,}"  # a debugger's memory, read as GBK
    f"|(?<=[\xc2-\xdf]){_TRAIL}|(?<=[\xe0-\xef]){_TRAIL}{{2}}|(?<=[\xf0-\xf4]){_TRAIL}{{3}}"  # UTF-8 as Latin-1
    ")"
)
_GARBLED_CHARACTERS = "\ufffd锟烫屯锛銆鐨鈥"
# Rae et al. 2021, Appendix A1.1; also found with a capital.
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """One number for each document, [D] each. Shares are of all characters unless stated."""

    characters: np.ndarray
    tokens: np.ndarray
    letter_share: np.ndarray
    """Letters and marks of any script, of the characters that are not spaces."""
    symbol_share: np.ndarray
    """Neither letter, mark, digit, space nor punctuation of prose, of the characters that are not spaces."""
    digit_share: np.ndarray
    """Of the characters that are not spaces."""
    space_share: np.ndarray
    han_share: np.ndarray
    """Of the letters."""
    garbled_share: np.ndarray
    """Lost or wrongly decoded characters."""
    word_length: np.ndarray
    """Mean letters and digits of a token."""
    line_length: np.ndarray
    """Mean characters of the non-blank lines."""
    longest_line: np.ndarray
    """Characters."""
    ellipsis_lines: np.ndarray
    """Share of the non-blank lines."""
    bullet_lines: np.ndarray
    """Share of the non-blank lines."""
    duplicate_lines: np.ndarray
    """Share of the non-blank lines that equal an earlier line of the document."""
    duplicate_line_characters: np.ndarray
    """Share of the characters in such lines."""


@functools.cache
def character_kinds() -> np.ndarray:
    """uint64 [0x110000]: a one in the ten-bit field of each kind of a code point."""
    kinds = np.zeros(sys.maxunicode + 1, np.uint64)
    # Only these ranges are assigned, private use aside; looking up all code points takes a quarter of a second.
    categories = np.full(len(kinds), "Cn")
    for assigned in (range(0x33480), range(0xE0000, 0xE01F0)):
        categories[assigned] = [unicodedata.category(chr(i)) for i in assigned]
    space = np.char.startswith(categories, "Z")
    space[[9, 10, 11, 12, 13, 0x85]] = True
    digit = categories == "Nd"
    letter = (
        np.char.startswith(categories, "L") | np.char.startswith(categories, "M") | np.isin(categories, ["Nl", "No"])
    )
    symbol = ~(space | digit | letter)
    symbol[[ord(c) for c in _PROSE]] = False
    suspect = np.zeros(len(kinds), bool)
    suspect[[ord(c) for c in _GARBLED_CHARACTERS]] = True
    suspect[0x80:0x85] = suspect[0x86:0xA0] = suspect[0xC2:0xF5] = True
    han = np.zeros(len(kinds), bool)
    for start, stop in _HAN:
        han[start : stop + 1] = True
    for kind, chosen in enumerate((digit, space, symbol, han, suspect, letter)):  # in the order of the constants
        kinds |= chosen.astype(np.uint64) << np.uint64(_BITS * kind)
    return kinds


def count_kinds(points: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 [6, S]: characters of each kind in each segment.

    `points` is uint32 [C]. Segment s is from starts[s] to the next start; starts begin at 0, ascend and are unique.
    """
    if not len(starts):
        return np.zeros((6, 0), np.int64)
    begins = np.zeros(len(points), bool)
    begins[::_STRETCH] = True
    begins[starts] = True
    cuts = np.flatnonzero(begins)
    packed = np.add.reduceat(character_kinds().take(points.astype(np.intp)), cuts)
    counts = np.stack([(packed >> np.uint64(_BITS * kind)) & np.uint64((1 << _BITS) - 1) for kind in range(6)])
    return np.add.reduceat(counts.astype(np.int64), np.searchsorted(cuts, starts), axis=1)


@functools.cache
def _is_bullet() -> np.ndarray:
    table = np.zeros(sys.maxunicode + 1, bool)
    table[[ord(c) for c in _BULLETS]] = True
    return table


def measure(texts: Sequence[str], tokens: Tokens) -> Statistics:
    """The statistics of about one piece (`tokens.pieces`) of documents; `tokens` are those of `hash_tokens`."""
    points, offsets = code_points(texts)
    sizes = np.diff(offsets)
    filled = np.flatnonzero(sizes)
    counts = np.zeros((6, len(texts)), np.int64)
    counts[:, filled] = count_kinds(points, offsets[filled])
    garbled = np.zeros(len(texts), np.int64)
    for i in np.flatnonzero(counts[SUSPECT]).tolist():
        garbled[i] = sum(map(len, _GARBLED.findall(texts[i])))
    number_of_tokens = np.diff(tokens.offsets)
    lines = _measure_lines(points, offsets)
    number_of_lines = np.maximum(lines["lines"], 1)
    visible = np.maximum(sizes - counts[SPACE], 1)
    return Statistics(
        characters=sizes,
        tokens=number_of_tokens,
        letter_share=counts[LETTER] / visible,
        symbol_share=counts[SYMBOL] / visible,
        digit_share=counts[DIGIT] / visible,
        space_share=counts[SPACE] / np.maximum(sizes, 1),
        han_share=counts[HAN] / np.maximum(counts[LETTER], 1),
        garbled_share=garbled / np.maximum(sizes, 1),
        word_length=(counts[LETTER] + counts[DIGIT]) / np.maximum(number_of_tokens, 1),
        line_length=lines["characters"] / number_of_lines,
        longest_line=lines["longest"],
        ellipsis_lines=lines["ellipsis"] / number_of_lines,
        bullet_lines=lines["bullet"] / number_of_lines,
        duplicate_lines=lines["duplicate"] / number_of_lines,
        duplicate_line_characters=lines["duplicate characters"] / np.maximum(lines["characters"], 1),
    )


def _measure_lines(points: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Counts over the non-blank lines of each document, [D] each."""
    begins = np.zeros(len(points) + 1, bool)
    begins[1:] = points == _NEWLINE
    begins[offsets[:-1]] = True
    starts = np.flatnonzero(begins[:-1])
    if not len(starts):
        zeros = np.zeros(len(offsets) - 1, np.int64)
        return dict.fromkeys(
            ("lines", "characters", "longest", "ellipsis", "bullet", "duplicate", "duplicate characters"), zeros
        )
    ends = np.append(starts[1:], len(points))
    hashes = hash_segments(points, starts)
    first, last, kept = _strip(points, starts, ends)
    starts, hashes = starts[kept], hashes[kept]
    bounds = np.searchsorted(starts, offsets)
    lengths = last - starts + 1
    dots = last - first >= 2
    for back in range(3):
        dots &= points[np.maximum(last - back, 0)] == ord(".")
    ellipsis = dots | (points[last] == ord("…"))
    bullet = _is_bullet()[points[first]] & (last > first)
    duplicate = first_occurrences(document_keys(Tokens(hashes, bounds))) != np.arange(len(hashes))
    longest = np.zeros(len(offsets) - 1, np.int64)
    filled = np.flatnonzero(np.diff(bounds))
    if len(filled):
        longest[filled] = np.maximum.reduceat(lengths, bounds[filled])
    return {
        "lines": np.diff(bounds),
        "characters": segment_sums(lengths, bounds),
        "longest": longest,
        "ellipsis": segment_sums(ellipsis, bounds),
        "bullet": segment_sums(bullet, bounds),
        "duplicate": segment_sums(duplicate, bounds),
        "duplicate characters": segment_sums(duplicate * lengths, bounds),
    }


def _strip(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First and last visible character of each non-blank line, and the numbers of these lines."""
    visible = (points > 0x20) & (points != 0xA0) & (points != 0x3000)
    edges = visible.copy()
    edges[1:] &= ~visible[:-1]
    edges[starts] = visible[starts]
    # A line has the runs of visible characters that begin at first[runs[i]] .. first[runs[i + 1] - 1].
    first = np.flatnonzero(edges)
    runs = np.searchsorted(first, np.append(starts, len(points)))
    kept = np.flatnonzero(np.diff(runs))
    last = ends[kept] - 1
    # Steps back over the newline and any white space before it.
    moving = np.flatnonzero(~visible[last])
    while len(moving):
        last[moving] -= 1
        moving = moving[~visible[last[moving]]]
    return first[runs[kept]], last, kept


def count_stop_words(tokens: Tokens) -> np.ndarray:
    """int64 [D]: how many of the eight stop words of Gopher's rule a document has, also with a capital."""
    words, hashes = _stop_table()
    low = tokens.hashes.astype(np.uint16)
    hits = np.flatnonzero(words[low])
    hits = hits[hashes[low[hits]] == tokens.hashes[hits]]
    found = np.zeros(len(tokens.offsets) - 1, np.uint8)
    bounds = np.searchsorted(hits, tokens.offsets)
    filled = np.flatnonzero(np.diff(bounds))
    if len(filled):
        found[filled] = np.bitwise_or.reduceat(words[low[hits]], bounds[filled])
    return np.bitwise_count(found).astype(np.int64)


@functools.cache
def _stop_table() -> tuple[np.ndarray, np.ndarray]:
    """By the low 16 bits of a hash: the bit of its word, uint8, or 0; and the whole hash, uint64."""
    words, table = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint64)
    hashes = hash_tokens([form for word in _STOP_WORDS for form in (word, word.capitalize())]).hashes
    low = hashes.astype(np.uint16)
    words[low] = np.repeat(1 << np.arange(len(_STOP_WORDS)), 2)
    table[low] = hashes
    return words, table


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64 [D]: sums of values[offsets[d] : offsets[d + 1]], 0 for an empty segment."""
    sums = offsets_of(values)
    return sums[offsets[1:]] - sums[offsets[:-1]]


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """int32 [N]: for each key the position of its first occurrence; fastest for about 10^5 keys, which fit the cache.

    Writes every position to its key's bucket, last to first, so that the bucket keeps the first one. Keys that find
    another key in their bucket are put into other buckets in the next round; each round places at least one key.
    """
    left = np.arange(len(keys), dtype=np.int32)
    first, values = left, keys
    bits = max(4, (2 * len(keys)).bit_length())
    table = np.empty(1 << bits, np.int32)
    multiplier = _BUCKETS
    while len(left):
        bucket = ((values * np.uint64(multiplier)) >> np.uint64(64 - bits)).astype(np.int64)
        table[bucket[::-1]] = left[::-1]
        found = table.take(bucket)
        if values is keys:
            first = found
        else:
            first[left] = found
        wrong = np.flatnonzero(keys.take(found) != values)
        left, values = left[wrong], values[wrong]
        multiplier = multiplier * _BUCKETS % (1 << 64)
    return first


def hash_segments(points: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """uint64 [S]: a hash of the characters from starts[s] to the next start, without a final newline.

    `points` is uint32 [C], `starts` ascend. 32 bits are a polynomial, the others the length: enough to distinguish the
    lines of one document.
    """
    powers, inverses = _place_powers(1 << max(16, len(points).bit_length()))
    values = (points - np.uint32(ord("\n"))) * powers[: len(points)]
    hashes = (np.add.reduceat(values, starts, dtype=np.uint32) * inverses[starts]).astype(np.uint64)
    ends = np.append(starts[1:], len(points))
    lengths = ends - starts - (points[ends - 1] == ord("\n"))
    return hashes | lengths.astype(np.uint64) << np.uint64(32)


@functools.cache
def _place_powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [count] each: powers of a number and of its inverse modulo 2^32."""
    base = 0x9E3779B1
    result = []
    for factor in (base, pow(base, -1, 1 << 32)):
        powers = np.full(count, factor, np.uint32)
        powers[0] = 1
        result.append(np.multiply.accumulate(powers, dtype=np.uint32))
    return result[0], result[1]


def document_keys(tokens: Tokens) -> np.ndarray:
    """uint64 [N]: the hashes, changed so that equal tokens of two documents differ."""
    counts = np.diff(tokens.offsets)
    salts = mix(np.arange(1, len(counts) + 1, dtype=np.uint64))
    return tokens.hashes ^ np.repeat(salts, counts)


def top_share(tokens: Tokens, n: int) -> np.ndarray:
    """float64 [D]: share of a document's tokens that its most frequent n-gram covers; 0 if none occurs twice.

    Overlapping occurrences count in full, as in Gopher's rule, so the share can be above 1.
    """
    ngrams = hash_ngrams(tokens, n)
    first = first_occurrences(document_keys(ngrams))
    counts = np.bincount(first, minlength=len(first))
    top = np.zeros(len(ngrams.offsets) - 1, np.int64)
    filled = np.flatnonzero(np.diff(ngrams.offsets))
    if len(filled):
        top[filled] = np.maximum.reduceat(counts, ngrams.offsets[filled])
    return np.where(top > 1, top * n, 0) / np.maximum(np.diff(tokens.offsets), 1)


def duplicate_share(tokens: Tokens, n: int) -> np.ndarray:
    """float64 [D]: share of a document's tokens in n-grams that occurred in it before, each token counted once."""
    ngrams = hash_ngrams(tokens, n)
    first = first_occurrences(document_keys(ngrams))
    again = np.flatnonzero(first != np.arange(len(first)))
    # From places among the n-grams to places among the tokens.
    counts = np.diff(ngrams.offsets)
    document = np.searchsorted(ngrams.offsets, again, side="right") - 1
    starts = again + (tokens.offsets[:-1] - ngrams.offsets[:-1])[document]
    # An n-gram adds the tokens that the one before it does not cover.
    new = np.minimum(np.diff(starts, prepend=-n), n)
    covered = np.bincount(document, new, minlength=len(counts))
    return covered / np.maximum(np.diff(tokens.offsets), 1)


def bounded(share: Callable[[Tokens, int], np.ndarray], tokens: Tokens, n: int, needed: np.ndarray) -> np.ndarray:
    """share(tokens, n) of the documents where `needed`, 0 elsewhere."""
    result = np.zeros(len(needed))
    documents = np.flatnonzero(needed)
    if len(documents):
        result[documents] = share(choose_tokens(tokens, needed), n)
    return result
