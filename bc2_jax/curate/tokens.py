"""Text -> hashed tokens, vectorised; duplicates, features and scores are computed on them.

A token is a run of letters, digits and underscores, or one character of a script that is written without spaces (Han,
kana, Thai ...). Case is kept. Everything else separates tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.data.ngrams import MULTIPLIER, NgramTable, hash_windows, mix

SEPARATOR, WORD, CHARACTER = 0, 1, 2
# Scripts without spaces between words, as ranges of code points.
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF),
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x20000, 0x3FFFF),
)  # fmt: skip
# Small enough that a piece stays in the cache, large enough that threads seldom wait for the interpreter.
_PIECE_CHARACTERS = 1 << 18
_PIECE_TOKENS = 1 << 18
_MASK = (1 << 64) - 1


class Tokens(NamedTuple):
    """The tokens of some documents."""

    hashes: np.ndarray
    """uint64 [N], the tokens of all documents in order; equal tokens have equal hashes."""
    offsets: np.ndarray
    """int64 [D + 1]: document d has tokens offsets[d] .. offsets[d + 1] - 1."""


class CodePoints(NamedTuple):
    """The characters of some documents."""

    values: np.ndarray
    """uint32 [C]."""
    offsets: np.ndarray
    """int64 [D + 1]."""


def offsets_of(counts: np.ndarray | Sequence[int]) -> np.ndarray:
    """int64 [D + 1]: 0 and the cumulative sums of `counts` [D]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def pieces(texts: Sequence[str], characters: int = _PIECE_CHARACTERS) -> Iterator[Sequence[str]]:
    """Consecutive texts of at most `characters` together; a longer text is a piece of its own."""
    start = size = 0
    for index, text in enumerate(texts):
        if size and size + len(text) > characters:
            yield texts[start:index]
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def code_points(texts: Sequence[str]) -> CodePoints:
    """The code points of all texts. Raises UnicodeEncodeError for a lone surrogate."""
    offsets = offsets_of([len(text) for text in texts])
    return CodePoints(np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32), offsets)


@functools.cache
def character_classes() -> np.ndarray:
    """uint8 [0x110000]: SEPARATOR, WORD or CHARACTER for every code point."""
    classes = np.strings.isalnum(np.arange(0x110000, dtype=np.uint32).view("<U1")).astype(np.uint8)
    # Combining marks belong to the word they modify.
    for start, stop in ((0x0300, 0x036F), (0x0483, 0x0487), (0x064B, 0x065F), (0x0900, 0x0DFF)):
        classes[start : stop + 1] = WORD
    classes[ord("_")] = WORD
    for start, stop in _UNSPACED:
        classes[start : stop + 1] *= CHARACTER
    return classes


def hash_tokens(texts: Sequence[str]) -> Tokens:
    """The hashed tokens of each text; a token has the same hash in any place."""
    parts = [_hash_piece(piece) for piece in pieces(texts)]
    if not parts:
        return Tokens(np.empty(0, np.uint64), np.zeros(1, np.int64))
    offsets = offsets_of(np.concatenate([np.diff(part.offsets) for part in parts]))
    return Tokens(np.concatenate([part.hashes for part in parts]), offsets)


def hash_ngrams(tokens: Tokens, n: int) -> Tokens:
    """The n-grams of each document, max(0, tokens - n + 1) of them, in order."""
    offsets = offsets_of(np.maximum(np.diff(tokens.offsets) - (n - 1), 0))
    windows = hash_windows(tokens.hashes, n)
    # Without those that reach into the next document.
    inside = np.ones(len(tokens.hashes), bool)
    for i in range(1, n):
        ends = tokens.offsets[1:] - i
        inside[ends[ends >= tokens.offsets[:-1]]] = False
    return Tokens(windows[inside[: len(windows)]], offsets)


def find_ngrams(table: NgramTable, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """(document, row of the table), int64 [M] each, for every n-gram of the table that a document has, once."""
    found = [np.empty((2, 0), np.int64)]
    for start, piece in token_pieces(tokens):
        grams = hash_ngrams(piece, table.n)
        places, rows = table.find(grams.hashes)
        documents = np.searchsorted(grams.offsets, places, side="right") - 1 + start
        found.append(np.unique(np.stack([documents, rows]), axis=1))
    documents, rows = np.concatenate(found, axis=1)
    return documents, rows


@functools.cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the multiplier and of its inverse modulo 2^64, uint64 [count] each."""
    inverse = pow(MULTIPLIER, -1, 1 << 64)
    result = []
    for base in (MULTIPLIER, inverse):
        powers = np.ones(count, np.uint64)
        powers[1:] = np.uint64(base & _MASK)
        result.append(np.multiply.accumulate(powers))
    return result[0], result[1]


def _hash_piece(texts: Sequence[str]) -> Tokens:
    points, offsets = code_points(texts)
    # `take` with platform integers is twice as fast as indexing with uint32.
    places = points.astype(np.intp)
    starts = _find_starts(character_classes().take(places), offsets)
    if not len(starts):
        return Tokens(np.empty(0, np.uint64), np.zeros_like(offsets))
    hashes = _hash_stretches(_mixed_tokens().take(places), starts, None)
    return Tokens(hashes, np.searchsorted(starts, offsets).astype(np.int64))


def _find_starts(classes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64: the first character of each token of some documents, by the classes of their characters."""
    word = classes == WORD
    first = classes == CHARACTER
    starts_word = word.copy()
    starts_word[1:] &= ~word[:-1]
    # Two documents never share a token.
    inner = offsets[:-1][offsets[:-1] < len(classes)]
    starts_word[inner] = word[inner]
    first |= starts_word
    return np.flatnonzero(first)


def count_characters(text: str) -> int:
    """Tokens of a text that are single characters, of scripts without spaces."""
    points, _ = code_points([text])
    return int(np.count_nonzero(character_classes().take(points.astype(np.intp)) == CHARACTER))


def token_starts(text: str) -> np.ndarray:
    """int64: the first character of each token of a text."""
    points, offsets = code_points([text])
    return _find_starts(character_classes().take(points.astype(np.intp)), offsets)


def hash_values(values: np.ndarray, starts: np.ndarray, stops: np.ndarray | None = None) -> np.ndarray:
    """uint64 [N]: hashes of stretches [starts, stops) of uint32 code points, in order, not empty, not overlapping.

    Without `stops` a stretch ends where the next begins. A stretch has the same hash in any place.
    """
    return _hash_stretches(_mixed().take(values.astype(np.intp)), starts, stops)


def _hash_stretches(terms: np.ndarray, starts: np.ndarray, stops: np.ndarray | None) -> np.ndarray:
    # sum of term * multiplier^(place), times multiplier^-(start), is the same at any place.
    powers, inverses = _powers(1 << max(16, len(terms).bit_length()))
    terms *= powers[: len(terms)]
    if not len(starts):
        return np.empty(0, np.uint64)
    if stops is None:
        sums = np.add.reduceat(terms, starts)
    else:
        # Every second sum is from a stop to the next start; a stop may be the end.
        edges = np.stack([starts, stops], axis=1).reshape(-1)
        sums = np.add.reduceat(np.append(terms, np.uint64(0)), edges)[::2]
    return mix(sums * inverses[starts])


@functools.cache
def _mixed() -> np.ndarray:
    """uint64 [0x110000]: a hash of each code point."""
    return mix(np.arange(1, 0x110001, dtype=np.uint64))


@functools.cache
def _mixed_tokens() -> np.ndarray:
    """The same, 0 for separators."""
    return np.where(character_classes() == SEPARATOR, np.uint64(0), _mixed())


def slice_tokens(tokens: Tokens, start: int, stop: int) -> Tokens:
    """The tokens of documents start .. stop - 1."""
    offsets = tokens.offsets[start : stop + 1]
    return Tokens(tokens.hashes[offsets[0] : offsets[-1]], offsets - offsets[0])


def choose_tokens(tokens: Tokens, kept: np.ndarray) -> Tokens:
    """The tokens of the documents that are kept, bool [D]."""
    counts = np.diff(tokens.offsets)
    return Tokens(tokens.hashes[np.repeat(kept, counts)], offsets_of(counts[kept]))


def without_first(tokens: Tokens, counts: np.ndarray) -> Tokens:
    """The documents without their first `counts` tokens, int64 [D]."""
    if not counts.any():
        return tokens
    sizes = np.diff(tokens.offsets)
    counts = np.minimum(counts, sizes)
    place = np.arange(len(tokens.hashes)) - np.repeat(tokens.offsets[:-1], sizes)
    return Tokens(tokens.hashes[place >= np.repeat(counts, sizes)], offsets_of(sizes - counts))


def token_pieces(tokens: Tokens, size: int = _PIECE_TOKENS) -> Iterator[tuple[int, Tokens]]:
    """(number of the first document, tokens of consecutive documents), of about `size` tokens or one document."""
    start, documents = 0, len(tokens.offsets) - 1
    while start < documents:
        stop = int(np.searchsorted(tokens.offsets, tokens.offsets[start] + size, side="right")) - 1
        stop = min(max(stop, start + 1), documents)
        yield start, slice_tokens(tokens, start, stop)
        start = stop
