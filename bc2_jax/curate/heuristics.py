"""Rules on counts that drop a document: too short, too many symbols, repeated, wrongly decoded, in random order ...

Gopher   The rules are those of Gopher (Rae et al. 2021, arXiv 2112.11446, Appendix A1.1): 50 to 100,000 words of 3 to
         10 letters on average, two stop words, at most 0.1 symbols a word, at most 90 % of the lines with a bullet and
         30 % with an ellipsis, 80 % of the words with a letter; duplicate lines at most 0.30 of the lines and 0.20 of
         the characters; the most frequent n-gram at most 0.20, 0.18, 0.16 (n = 2, 3, 4), duplicate n-grams at most
         0.15 .. 0.10 (n = 5 .. 10). Those limits are for web pages of running text. Manuals, tables of functions and
         verse repeat more, and of technical text the limits drop a tenth. So our limits on repetition are wider;
         Gopher's can be set in a config file.
Chinese  A token is a character, and a word is about two: duplicates are counted over twice the n. The shortest document
         is a classical quatrain. A minimum share of Han letters replaces the stop words.
Code     No rules on words or bullets, and wide limits on spaces and duplicate lines. Lines are limited as for Codex
         (Chen et al. 2021, arXiv 2107.03374, section 3.1): 100 characters on average, 1000 at most.
Kinds    Limits of running text do not fit code in a document of another language, mathematics, lists, tables, dialogue
         and verse. A document that breaks one is judged again by the limits of its kind (`kinds`).
Order    Tables of how often words, letters and Han characters follow each other find random order (`gibberish`).

C4's rules (Raffel et al. 2020, section 2.2) on single lines are in `cuts`. Its rules that drop a page with a
curly bracket or a line without a final full stop would remove technical text and verse, and are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.curate.gibberish import measure_order
from bc2_jax.curate.kinds import KINDS, kind_of
from bc2_jax.curate.statistics import bounded, count_stop_words, duplicate_share, measure, top_share
from bc2_jax.curate.tokens import Tokens, choose_tokens, hash_tokens, pieces, slice_tokens
from bc2_jax.validation import require

NgramLimits = tuple[tuple[int, float], ...]
_PIECE_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for the documents of one language; None, or no n-gram, switches a rule off. Defaults: any language."""

    min_characters: int | None = 20
    """A classical quatrain has 20 characters and its punctuation."""
    max_characters: int | None = None
    """None by default: a long document is a book."""
    min_tokens: int | None = None
    """Tokens (`tokens`) are words and Han characters."""
    max_tokens: int | None = None
    """Gopher drops pages above 100,000 words."""
    min_letter_share: float | None = 0.4
    """Share of letters of any script in the characters that are not spaces."""
    max_symbol_share: float | None = 0.25
    """Share of symbols (not letter, digit, space or punctuation of prose) in the characters that are not spaces."""
    max_digit_share: float | None = 0.5
    """Share of the characters that are not spaces."""
    max_space_share: float | None = 0.6
    """Share of spaces, tabs and line ends in all characters."""
    max_garbled_share: float | None = 0.01
    """Share of lost or wrongly decoded characters in all characters."""
    min_han_share: float | None = None
    """Share of the letters."""
    min_stop_words: int | None = None
    """Number of different words of: the, be, to, of, and, that, have, with."""
    min_word_length: float | None = None
    """Mean letters and digits of a token."""
    max_word_length: float | None = None
    """Mean letters and digits of a token."""
    min_line_length: float | None = None
    """Mean characters of the non-blank lines."""
    max_line_length: float | None = None
    """Mean characters of the non-blank lines."""
    max_longest_line: int | None = None
    """Characters."""
    min_word_order: float | None = None
    """How much more often than by chance English words follow each other; needs 16 pairs of known words."""
    min_known_pairs: float | None = 0.2
    """Share of the pairs of neighbouring Han characters that occur in real text; needs 16 pairs. Random text has .1."""
    max_letter_surprise: float | None = 4.2
    """Nats a letter, where few words are known English words: random letters have 6, other languages 2 to 3."""
    max_ellipsis_lines: float | None = 0.3
    """Share of the lines that end with an ellipsis (Gopher)."""
    max_bullet_lines: float | None = 0.9
    """Share of the lines that start with a bullet (Gopher)."""
    max_duplicate_lines: float | None = 0.6
    """Share of the lines that occurred before in the document. Gopher: 0.3, for pages without markup."""
    max_duplicate_line_characters: float | None = 0.5
    """Share of the characters that such lines have. Gopher: 0.2."""
    top_ngrams: NgramLimits = ((2, 0.35), (4, 0.30))
    """(n, largest share of the tokens that the most frequent n-gram may cover)."""
    duplicate_ngrams: NgramLimits = ((10, 0.40), (20, 0.35))
    """(n, largest share of the tokens in n-grams that occurred before in the document)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = f"heuristics.{field.name}"
            if field.name in ("top_ngrams", "duplicate_ngrams"):
                sizes = [n for n, _ in value]
                require(
                    sizes == sorted(set(sizes)) and all(n > 1 and share > 0 for n, share in value),
                    name, value, "it must be pairs (n, share), n above 1 and rising, share above 0",
                )  # fmt: skip
            elif value is not None:
                require(value >= 0, name, value, "it must be at least 0, or None")
                if field.name.endswith(("_share", "_lines", "_line_characters")):
                    require(value <= 1, name, value, "it is a share and must be at most 1")
                low = getattr(self, field.name.replace("max_", "min_"), None)
                require(low is None or low <= value, name, value, f"it must be at least {low}, the minimum")


def _english() -> Limits:
    return Limits(
        min_stop_words=2, min_word_length=2.5, max_word_length=10, min_word_order=0.62,
        duplicate_ngrams=((5, 0.40), (10, 0.35)),
    )  # fmt: skip


def _chinese() -> Limits:
    # Titles repeat in a series of verses.
    return Limits(min_characters=12, min_han_share=0.1, duplicate_ngrams=((10, 0.50), (20, 0.45)))


def _code() -> Limits:
    return Limits(
        min_characters=50, min_letter_share=0.2, max_symbol_share=0.5, max_digit_share=0.7, max_space_share=0.8,
        max_line_length=100, max_longest_line=1000, max_ellipsis_lines=None, max_bullet_lines=None,
        max_duplicate_lines=0.8, max_duplicate_line_characters=0.7, top_ngrams=(), duplicate_ngrams=((10, 0.70),),
        min_known_pairs=None, max_letter_surprise=None,
    )  # fmt: skip


def _mathematics() -> Limits:
    return Limits(
        min_letter_share=0.05, max_symbol_share=0.7, max_digit_share=0.8, max_letter_surprise=None,
        max_bullet_lines=None, top_ngrams=(), duplicate_ngrams=((10, 0.60),),
    )  # fmt: skip


def _lines() -> Limits:
    # Refrains, columns and names of speakers repeat.
    return Limits(
        min_letter_share=0.15, max_symbol_share=0.4, max_digit_share=0.75, max_bullet_lines=None, min_word_order=0.5,
        max_duplicate_lines=0.7, max_duplicate_line_characters=0.7,
        top_ngrams=((2, 0.50), (4, 0.45)), duplicate_ngrams=((10, 0.65),),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeuristicsConfig:
    """Limits for running text by language, and for other kinds of text."""

    zh: Limits = dataclasses.field(default_factory=_chinese)
    """Chinese."""
    en: Limits = dataclasses.field(default_factory=_english)
    """English."""
    code: Limits = dataclasses.field(default_factory=_code)
    """Program source."""
    other: Limits = dataclasses.field(default_factory=Limits)
    """Every other language."""
    mathematics: Limits = dataclasses.field(default_factory=_mathematics)
    """Formulas and calculations, in any language."""
    lines: Limits = dataclasses.field(default_factory=_lines)
    """Lists, tables, dialogue, verse, in any language. The kind of a document is only determined if it breaks a limit
    for running text."""
    stop_word_tokens: int = 40
    """Documents with fewer tokens need no stop words: a question and its answer may have none."""
    repetition_tokens: int = 50
    """Documents with fewer tokens are not tested for repeated n-grams: a refrain is not spam. Gopher drops these
    documents."""

    def __post_init__(self) -> None:
        for field in ("stop_word_tokens", "repetition_tokens"):
            require(getattr(self, field) >= 0, f"heuristics.{field}", getattr(self, field), "it must be >= 0")


class Verdicts(NamedTuple):
    """The verdict on each document."""

    reasons: list[str | None]
    """None for a document that stays, else "RULE = VALUE, limit N" of the first rule that it breaks."""
    scores: np.ndarray
    """float32 [D] in 0..1, the distance from all limits: see `examine`."""


# Field of Limits -> field of Statistics. The first rule broken is the reason.
_RULES = {
    "min_characters": "characters", "max_characters": "characters", "min_tokens": "tokens", "max_tokens": "tokens",
    "max_garbled_share": "garbled_share", "min_letter_share": "letter_share", "max_symbol_share": "symbol_share",
    "max_digit_share": "digit_share", "max_space_share": "space_share", "min_han_share": "han_share",
    "min_known_pairs": "known_pairs", "max_letter_surprise": "letter_surprise", "min_word_order": "word_order",
    "min_word_length": "word_length", "max_word_length": "word_length", "min_line_length": "line_length",
    "max_line_length": "line_length", "max_longest_line": "longest_line", "max_ellipsis_lines": "ellipsis_lines",
    "max_bullet_lines": "bullet_lines", "max_duplicate_lines": "duplicate_lines",
    "max_duplicate_line_characters": "duplicate_line_characters", "min_stop_words": "stop_words",
}  # fmt: skip
_ORDER_RULES = ("min_known_pairs", "max_letter_surprise", "min_word_order")


def examine(
    texts: Sequence[str], languages: Sequence[str], config: HeuristicsConfig, tokens: Tokens | None = None
) -> Verdicts:
    """Reasons to drop documents, and a score of quality for runs without a trained model.

    The score is the geometric mean of the margins of all rules for the document's language or kind: 1 - value / limit
    for a maximum, 1 - limit / value for a minimum, at least 0.001. It measures how ordinary a document looks and how
    far from random order its words are, not how good it is; 0 for a document to drop. `tokens` are those of
    `hash_tokens(texts)`, if they are known.
    """
    limits = (config.zh, config.en, config.code, config.other)
    names = ("zh", "en", "code")
    group = np.array([names.index(language) if language in names else 3 for language in languages], np.int64)
    tokens = hash_tokens(texts) if tokens is None else tokens
    verdicts = _examine(texts, tokens, group, limits, config)
    again = np.zeros(len(texts), bool)
    kinds = np.zeros(len(texts), np.int64)
    for place, reason in enumerate(verdicts.reasons):
        if reason is not None:
            kind = kind_of(texts[place], languages[place])
            kinds[place] = KINDS.index(kind)
            again[place] = kind != ("code" if languages[place] == "code" else "prose")
    if again.any():
        places = np.flatnonzero(again).tolist()
        of_kind = (config.other, config.code, config.mathematics, config.lines)
        found = _examine([texts[i] for i in places], choose_tokens(tokens, again), kinds[again], of_kind, config)
        for place, reason in zip(places, found.reasons, strict=True):
            verdicts.reasons[place] = reason
        verdicts.scores[again] = found.scores
    return verdicts


def _examine(
    texts: Sequence[str], tokens: Tokens, group: np.ndarray, limits: tuple[Limits, ...], config: HeuristicsConfig
) -> Verdicts:
    """Verdicts by the limits of each document's `group`."""
    measured: list[dict[str, np.ndarray]] = []
    start = 0
    for piece in pieces(texts, _PIECE_CHARACTERS):
        stop = start + len(piece)
        part = slice_tokens(tokens, start, stop)
        statistics = measure(piece, part)
        values = {field.name: getattr(statistics, field.name) for field in dataclasses.fields(statistics)}
        values |= _order(piece, group[start:stop], statistics.han_share, limits)
        if any(one.min_stop_words is not None for one in limits):
            enough = statistics.tokens >= config.stop_word_tokens
            values["stop_words"] = np.where(enough, count_stop_words(part), np.nan)
        long_enough = statistics.tokens >= config.repetition_tokens
        values |= _repetition(part, long_enough, group[start:stop], limits)
        measured.append(values)
        start = stop
    columns = {name: np.concatenate([values[name] for values in measured]) for name in (measured or [{}])[0]}
    return _judge(columns, group, limits)


def _order(
    texts: Sequence[str], group: np.ndarray, han_share: np.ndarray, limits: tuple[Limits, ...]
) -> dict[str, np.ndarray]:
    """The values of `measure_order`; NaN for documents without a limit on one of them."""
    limited = [any(getattr(one, rule) is not None for rule in _ORDER_RULES) for one in limits]
    needed = np.flatnonzero(np.array(limited)[group])
    order = measure_order([texts[i] for i in needed.tolist()], han_share[needed])
    result = {}
    for field in dataclasses.fields(order):
        result[field.name] = np.full(len(group), np.nan)
        result[field.name][needed] = getattr(order, field.name)
    return result


def _repetition(
    tokens: Tokens, long_enough: np.ndarray, group: np.ndarray, limits: tuple[Limits, ...]
) -> dict[str, np.ndarray]:
    """Shares of the n-grams that have a limit, [D] each; NaN where a shorter n-gram shows that the limit holds.

    An n-gram is at most as frequent as the shorter n-gram it begins with, and shorter duplicates cover the tokens that
    longer ones cover. So most documents need only the shortest n-grams.
    """
    result = {}
    for rule, share in (("top_ngrams", top_share), ("duplicate_ngrams", duplicate_share)):
        bound = np.full(len(group), np.inf)
        for n in _sizes(limits, rule):
            limit = _ngram_limit(limits, rule, n)[group]
            scale = n if rule == "top_ngrams" else 1
            needed = long_enough & (bound * scale > limit)
            found = bounded(share, tokens, n, needed)
            result[f"{rule}({n})"] = np.where(needed, found, np.nan)
            bound[needed] = found[needed] / scale
    return result


def _sizes(limits: tuple[Limits, ...], rule: str) -> list[int]:
    return sorted({n for one in limits for n, _ in getattr(one, rule)})


def _ngram_limit(limits: tuple[Limits, ...], rule: str, n: int) -> np.ndarray:
    """float64 [groups], NaN without a limit."""
    return np.array([dict(getattr(one, rule)).get(n, np.nan) for one in limits])


def _judge(columns: dict[str, np.ndarray], group: np.ndarray, limits: tuple[Limits, ...]) -> Verdicts:
    """Verdicts on documents with these values, by the limits of each document's `group`."""
    rules = []
    for name, column in _RULES.items():
        of_language = [getattr(one, name) for one in limits]
        if any(value is not None for value in of_language):
            rules.append((name, column, np.array([np.nan if value is None else value for value in of_language])))
    for name in ("top_ngrams", "duplicate_ngrams"):
        rules += [(f"{name}({n})", f"{name}({n})", _ngram_limit(limits, name, n)) for n in _sizes(limits, name)]
    reasons: list[str | None] = [None] * len(group)
    logarithms, count = np.zeros(len(group)), np.zeros(len(group))
    for name, column, by_language in rules if len(group) else ():
        values, limit = columns[column], by_language[group]
        small, large = (limit, values) if name.startswith("min") else (values, limit)
        # A comparison with NaN is False: no limit, or no value, breaks no rule.
        for i in np.flatnonzero(small > large).tolist():
            reasons[i] = reasons[i] or f"{name} = {values[i]:.4g}, limit {limit[i]:.4g}"
        applies = ~np.isnan(small + large)
        margin = 1 - small / np.where(large > 0, large, 1)
        logarithms += np.log(np.where(applies, np.clip(margin, 1e-3, 1), 1))
        count += applies
    scores = np.exp(logarithms / np.maximum(count, 1))
    scores[[reason is not None for reason in reasons]] = 0
    return Verdicts(reasons, scores.astype(np.float32))
