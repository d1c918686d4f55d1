"""Random order: whether words, letters and Han characters follow each other as in real text.

The tables in `ngrams.npz` were counted by `benchmarks/ngram_table.py` on free text. They have
  the 6,000 most frequent English words in 220 classes of similar words, and how often one class follows another;
  how often a letter follows two others, in English and eleven other languages of Latin script;
  the 4,096 most frequent Han characters and the 150,000 most frequent pairs of them.
In all three, real text, classical and technical text and verse too, is far from random text, so the tables need not fit
the text that is curated. Three windows of a long document are read.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bc2_jax.curate.languages import sample
from bc2_jax.curate.statistics import segment_sums
from bc2_jax.curate.tokens import Tokens, code_points, hash_tokens, pieces

# Units of the integers in the tables in a nat.
_STEPS = 16
_SLOT_BITS = 18
_LEAST_PAIRS, _LEAST_LETTERS = 16, 40
# Neutral pairs added to a document's pairs, so that a short document needs clearer evidence.
_PRIOR_WORDS, _PRIOR_PAIRS = 10, 2
_HAN_START, _HAN_STOP = 0x3400, 0xA000
# Documents with a smaller share of known words are measured letter by letter.
_KNOWN_WORDS = 0.4


@dataclasses.dataclass(frozen=True)
class Order:
    """One number for each document, float64 [D]; NaN for too little text in the script."""

    word_order: np.ndarray
    """How much more often than by chance English words follow each other, geometric mean; about 1.7 in prose."""
    known_pairs: np.ndarray
    """Share of the pairs of neighbouring Han characters that are in the table; .6 in prose."""
    letter_surprise: np.ndarray
    """Nats a letter in Latin script, about 2.2; only measured where few words are known English words."""


@dataclasses.dataclass(frozen=True)
class _Tables:
    slots: np.ndarray
    """uint32 [2^18]: the high bits of a word's hash, by its low bits."""
    slot_classes: np.ndarray
    """uint8 [2^18]: the class of that word; the last class has all other words."""
    class_gains: np.ndarray
    """int8 [C, C]: log of how much more often than by chance one class follows another."""
    letters: np.ndarray
    """uint8 [27 * 27 * 27]: minus the log-probability of the third letter."""
    character_numbers: np.ndarray
    """uint16, by code point - 0x3400; 4096 for characters that are not frequent."""
    known_pairs: np.ndarray
    """uint8 [4097, 513], bits of the second character, highest first."""


@functools.cache
def _tables() -> _Tables:
    with np.load(Path(__file__).with_name("ngrams.npz"), allow_pickle=False) as file:
        arrays = dict(file)
    words = arrays["words"].tobytes().decode().split("\n")
    forms = [form for word in words for form in (word, word.capitalize(), word.upper())]
    # Of two words in one slot the more frequent one stays, which is the earlier one.
    hashes = hash_tokens(forms).hashes[::-1]
    low = hashes & np.uint64((1 << _SLOT_BITS) - 1)
    slots = np.zeros(1 << _SLOT_BITS, np.uint32)
    slots[low] = hashes >> np.uint64(32)
    classes = np.full(1 << _SLOT_BITS, len(arrays["class_gains"]) - 1, np.uint8)
    classes[low] = np.repeat(arrays["word_classes"], 3)[::-1]
    count = len(arrays["characters"])
    numbers = np.full(_HAN_STOP - _HAN_START, count, np.uint16)
    numbers[arrays["characters"] - _HAN_START] = np.arange(count)
    numbers[arrays["traditional"] - _HAN_START] = numbers[arrays["simplified"] - _HAN_START]
    return _Tables(
        slots, classes, arrays["class_gains"], arrays["letters"].reshape(-1), numbers,
        np.pad(arrays["known_pairs"], ((0, 1), (0, 1))),
    )  # fmt: skip


def measure_order(texts: Sequence[str], han_share: np.ndarray) -> Order:
    """The order of some documents; `han_share` float [D] is the share of Han characters among their letters."""
    samples = [sample(text) for text in texts]
    word_order, known_pairs, surprise = np.full((3, len(texts)), np.nan)
    latin, han = np.flatnonzero(han_share < 0.5), np.flatnonzero(han_share > 0.1)
    for places, into in ((han, known_pairs), (latin, word_order)):
        done = 0
        for piece in pieces([samples[i] for i in places.tolist()]):
            part = places[done : done + len(piece)]
            done += len(piece)
            if into is known_pairs:
                known_pairs[part] = _known_pairs(piece)
                continue
            tokens = hash_tokens(piece)
            word_order[part], known = _measure_words(tokens)
            for k in np.flatnonzero(known < _KNOWN_WORDS * np.diff(tokens.offsets)).tolist():
                surprise[part[k]] = _letter_surprise(piece[k])
    return Order(word_order, known_pairs, surprise)


def _measure_words(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Word order, and how many tokens are known words, [D] each."""
    tables = _tables()
    other = len(tables.class_gains) - 1
    low = (tokens.hashes & np.uint64((1 << _SLOT_BITS) - 1)).astype(np.intp)
    hit = tables.slots.take(low) == (tokens.hashes >> np.uint64(32)).astype(np.uint32)
    classes = np.where(hit, tables.slot_classes.take(low), other)
    # Only pairs of known words count: other words may be names, numbers, another language.
    both = hit[1:] & hit[:-1]
    inner = tokens.offsets[1:-1]
    both[inner[(inner > 0) & (inner < len(hit))] - 1] = False
    gains = np.zeros(len(hit), np.int32)
    pairs = np.flatnonzero(both)
    gains[pairs] = tables.class_gains[classes[pairs], classes[pairs + 1]]
    counted = np.zeros(len(hit), bool)
    counted[pairs] = True
    number = segment_sums(counted, tokens.offsets)
    mean = segment_sums(gains, tokens.offsets) / _STEPS / (number + _PRIOR_WORDS)
    order = np.where(number >= _LEAST_PAIRS, np.exp(mean), np.nan)
    return order, segment_sums(hit, tokens.offsets)


def _known_pairs(texts: Sequence[str]) -> np.ndarray:
    points, offsets = code_points(texts)
    result = np.full(len(texts), np.nan)
    han = (points >= _HAN_START) & (points < _HAN_STOP)
    both = han[1:] & han[:-1]
    inner = offsets[1:-1]
    both[inner[(inner > 0) & (inner < len(points))] - 1] = False
    pairs = np.flatnonzero(both)
    bounds = np.searchsorted(pairs, offsets)
    chosen = np.diff(bounds) >= _LEAST_PAIRS
    tables = _tables()
    first = tables.character_numbers.take(points[pairs] - _HAN_START)
    second = tables.character_numbers.take(points[pairs + 1] - _HAN_START)
    keys = first.astype(np.int64) * (tables.known_pairs.shape[1] * 8) + second
    bits = tables.known_pairs.reshape(-1).take(keys >> 3)
    known = (bits >> (7 - (keys & 7)).astype(np.uint8)) & 1
    share = segment_sums(known, bounds) / np.maximum(np.diff(bounds), 1)
    for i in np.flatnonzero(chosen).tolist():
        result[i] = share[i]
        if share[i] < 0.5:
            # A repeated name counts once; in ordinary text that makes no difference.
            places = pairs[bounds[i] : bounds[i + 1]]
            _, first_of = np.unique(points[places].astype(np.int64) << 32 | points[places + 1], return_index=True)
            enough = len(first_of) >= _LEAST_PAIRS
            values = known[bounds[i] + first_of]
            result[i] = (values.sum() + _PRIOR_PAIRS) / (len(values) + _PRIOR_PAIRS) if enough else np.nan
    return result


def _letter_surprise(text: str) -> float:
    """NaN for fewer than 40 letters, or if most letters are not Latin."""
    text = unicodedata.normalize("NFD", text.lower())
    points = np.frombuffer(f"  {text} ".encode("utf-32-le"), np.uint32)
    points = points[(points < 0x300) | (points >= 0x370)]
    letters = np.where((points >= ord("a")) & (points <= ord("z")), points - ord("a") + 1, 0)
    letters = letters[np.append(True, (letters[1:] > 0) | (letters[:-1] > 0))].astype(np.intp)
    count = np.count_nonzero(letters)
    if count < _LEAST_LETTERS or 2 * count < sum(map(str.isalpha, text)):
        return float("nan")
    steps = _tables().letters.take((letters[:-2] * 27 + letters[1:-1]) * 27 + letters[2:])
    return float(steps.sum() / _STEPS / count)
