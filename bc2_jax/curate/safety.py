"""Harmful documents, found by the user's keywords and by a model trained on the user's examples.

The package has no list of words: who curates decides what is harmful. The model is a `QualityModel` trained with safe
documents as the good ones. Every finding is kept for an audit, whatever is done with its document.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from bc2_jax.curate.quality import QualityModel
from bc2_jax.curate.tokens import (
    WORD,
    Tokens,
    character_classes,
    find_ngrams,
    hash_ngrams,
    hash_tokens,
    slice_tokens,
)
from bc2_jax.data.ngrams import NgramTable, make_table
from bc2_jax.validation import require, require_literals

if TYPE_CHECKING:
    import pyarrow as pa

_EXCERPT = 40
# Tokens of each keyword by which documents are looked up.
_PREFIX = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeywordFile:
    """Keywords of one category."""

    category: str
    """Name in the audit log."""
    path: str
    """UTF-8 text, one keyword a line; empty lines and lines that begin with # are skipped."""

    def __post_init__(self) -> None:
        require(bool(self.category), "safety.keywords.category", self.category, "it can't be empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """When a document is harmful; without keywords and model none is."""

    keywords: tuple[KeywordFile, ...] = ()
    """Lists of keywords by category."""
    case_sensitive: bool = False
    """Whether keywords are found only in their own case."""
    min_keywords: int = 1
    """Number of different keywords, over all categories, from which on a document is harmful."""
    model: str | None = None
    """.npz of a QualityModel, trained with safe documents as good and harmful ones as bad."""
    min_score: float = 0.5
    """A document with a lower score of the model is harmful."""
    action: Literal["drop", "report"] = "drop"
    """What to do with harmful documents."""

    def __post_init__(self) -> None:
        require_literals(self, "safety.")
        require(self.min_keywords > 0, "safety.min_keywords", self.min_keywords, "it must be positive")
        require(0 <= self.min_score <= 1, "safety.min_score", self.min_score, "it must be in 0..1")


class Finding(NamedTuple):
    """A row of the audit log."""

    document: int
    """Its index among the texts."""
    category: str
    """Of the keyword; "model" for a score."""
    keyword: str | None
    """None for a score."""
    score: float | None
    """Of the model; None for a keyword."""
    excerpt: str
    """The keyword with 40 characters around it, or the start of the document."""


class KeywordMatcher:
    """Finds keywords literally: in scripts with spaces as whole words, in Han anywhere.

    White space in a keyword matches any white space. Raises ValueError for a keyword without a letter or digit.
    """

    def __init__(self, keywords: Mapping[str, Sequence[str]], *, case_sensitive: bool = False) -> None:
        self._case_sensitive = case_sensitive
        self._entries: list[tuple[str, str, re.Pattern[str]]] = []
        for category, words in keywords.items():
            for word in dict.fromkeys(words):
                pattern = r"\s+".join(map(re.escape, self._fold(word).split()))
                self._entries.append((category, word, re.compile(pattern)))
        folded = [self._fold(word) for _, word, _ in self._entries]
        # Texts need not be folded for keywords without upper case.
        self._folds = any(word.lower() != word.upper() for word in folded) and not case_sensitive
        tokens = hash_tokens(folded)
        sizes = np.minimum(np.diff(tokens.offsets), _PREFIX)
        for k in np.flatnonzero(sizes == 0).tolist():
            require(False, "safety.keywords", self._entries[k][1], "it must have a letter or a digit")
        self._tables: list[NgramTable] = []
        for n in range(1, _PREFIX + 1):
            numbers = np.flatnonzero(sizes == n)
            grams = [hash_ngrams(slice_tokens(tokens, k, k + 1), n).hashes[:1] for k in numbers.tolist()]
            if grams:
                self._tables.append(make_table(n, np.concatenate(grams), numbers))

    @classmethod
    def read(cls, config: SafetyConfig) -> KeywordMatcher:
        """The keywords of all files of `config`. Raises ValueError for a file that is missing or has no keyword."""
        keywords: dict[str, list[str]] = {}
        for file in config.keywords:
            require(Path(file.path).is_file(), "safety.keywords.path", file.path, "it must be a file")
            lines = map(str.strip, Path(file.path).read_text(encoding="utf-8").split("\n"))
            words = [line for line in lines if line and not line.startswith("#")]
            require(len(words) > 0, "safety.keywords.path", file.path, "it must have a keyword")
            keywords.setdefault(file.category, []).extend(words)
        return cls(keywords, case_sensitive=config.case_sensitive)

    def find(self, texts: Sequence[str], tokens: Tokens | None = None) -> list[Finding]:
        """The first place of every keyword in every text, by text and then in the order of the keywords.

        `tokens` are those of `hash_tokens(texts)`, if they are known.
        """
        folded = texts
        if self._folds:
            folded, tokens = [text.lower() for text in texts], None
        tokens = hash_tokens(folded) if tokens is None else tokens
        pairs: list[tuple[int, int]] = []
        for table in self._tables:
            documents, rows = find_ngrams(table, tokens)
            pairs += zip(documents.tolist(), table.numbers[rows].tolist(), strict=True)
        findings = []
        for document, number in sorted(pairs):
            category, word, pattern = self._entries[number]
            for match in pattern.finditer(folded[document]):
                if _stands_alone(folded[document], match):
                    # If the lower case is longer, places do not fit the text, and the excerpt is from the lower case.
                    same = len(folded[document]) == len(texts[document])
                    shown = texts[document] if same else folded[document]
                    excerpt = shown[max(0, match.start() - _EXCERPT) : match.end() + _EXCERPT]
                    findings.append(Finding(document, category, word, None, excerpt))
                    break
        return findings

    def _fold(self, word: str) -> str:
        return word if self._case_sensitive else word.lower()


def find_harmful(
    texts: Sequence[str], config: SafetyConfig, tokens: Tokens | None = None
) -> tuple[np.ndarray, list[Finding]]:
    """(bool [D], which documents are harmful; every finding, harmful or not, by document).

    `tokens` are those of `hash_tokens(texts)`, if they are known. Reads the files that `config` names.
    """
    tokens = hash_tokens(texts) if tokens is None else tokens
    findings = KeywordMatcher.read(config).find(texts, tokens) if config.keywords else []
    places = np.array([finding.document for finding in findings], np.int64)
    harmful = np.bincount(places, minlength=len(texts)) >= config.min_keywords
    if config.model is not None:
        scores = QualityModel.load(config.model).score(texts, tokens)
        for i in np.flatnonzero(scores < config.min_score).tolist():
            harmful[i] = True
            findings.append(Finding(i, "model", None, float(scores[i]), texts[i][: 2 * _EXCERPT]))
        findings.sort(key=lambda finding: finding.document)
    return harmful, findings


def audit_table(findings: Sequence[Finding], documents: np.ndarray) -> pa.Table:
    """The audit log: doc int64, category, keyword, score, excerpt. `documents` int64 [D] are the ids of the texts."""
    import pyarrow as pa

    columns = list(zip(*findings, strict=True)) or [()] * len(Finding._fields)
    kinds = (pa.int64(), pa.string(), pa.string(), pa.float32(), pa.string())
    doc = np.asarray(documents, np.int64)[np.array(columns[0], np.int64)]
    return pa.table(
        [pa.array(column, kind) for column, kind in zip([doc, *columns[1:]], kinds, strict=True)],
        names=["doc", *Finding._fields[1:]],
    )


def _stands_alone(text: str, match: re.Match[str]) -> bool:
    """Whether the match is not part of a longer word of a script with spaces."""
    classes = character_classes()

    def joined(left: int) -> bool:
        pair = text[max(left, 0) : left + 2]
        return left >= 0 and len(pair) == 2 and all(classes[ord(c)] == WORD for c in pair)

    return not joined(match.start() - 1) and not joined(match.end() - 1)
