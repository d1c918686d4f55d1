"""Drawing a sample of documents to train a tokenizer on, and held-out documents to measure it with.

Draws are by a hash of the text, so the sample does not depend on the order of files and documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import math
from collections.abc import Mapping

from bc2_jax.data.packing import split_of
from bc2_jax.validation import require


@dataclasses.dataclass
class LanguageCounts:
    """Documents of one language, and UTF-8 bytes of their text."""

    documents: int = 0
    bytes: int = 0
    held_out_documents: int = 0
    """Reserved for validation."""
    unweighted_documents: int = 0
    """With weight 0: never drawn."""
    empty_documents: int = 0
    drawn_documents: int = 0
    drawn_bytes: int = 0
    cut_documents: int = 0
    """Drawn documents of which only the beginning fits."""
    asked_bytes: int | None = None
    """Bytes that the shares ask for; None without shares."""


@dataclasses.dataclass(frozen=True)
class TokenizerSample:
    """The result of `SampleDrawer`."""

    texts: list[str]
    """Training texts, in an order that depends on the texts alone."""
    held_out: dict[str, list[str]]
    """By language; none of these texts is in `texts`."""
    counts: dict[str, LanguageCounts]
    """By language."""

    def shortfalls(self) -> list[str]:
        """Languages with too little text for their share."""
        return [
            f"{language}: {count.drawn_bytes:,} bytes of the {count.asked_bytes:,} its share asks for"
            for language, count in self.counts.items()
            if count.asked_bytes is not None and count.drawn_bytes < count.asked_bytes - 3  # a cut keeps characters
        ]


class SampleDrawer:
    """Draws a sample of at most `sample_bytes` from a stream of documents, in little more memory than that.

    A document is drawn with a probability proportional to its weight, up to 1 (sequential Poisson sampling, Ohlsson
    1998: the smallest u / weight, u in (0, 1] being a hash of the text). `shares`, such as {"zh": 0.45, "en": 0.35,
    "code": 0.2}, gives each of these languages its part of the bytes and drops all others. Documents that
    `packing.split_of` holds out for validation are never drawn; about `held_out_bytes` a language of them are kept,
    whole, drawn without weights. Raises ValueError for a bad argument.
    """

    def __init__(
        self,
        sample_bytes: int,
        *,
        shares: Mapping[str, float] | None = None,
        held_out_fraction: float = 0.01,
        held_out_bytes: int = 5_000_000,
    ) -> None:
        require(sample_bytes > 0, "sample_bytes", sample_bytes, "it must be positive")
        require(0 < held_out_fraction < 1, "held_out_fraction", held_out_fraction, "it must be in (0, 1)")
        require(held_out_bytes > 0, "held_out_bytes", held_out_bytes, "it must be positive")
        if shares is not None:
            good = shares and all(share > 0 for share in shares.values()) and math.isclose(sum(shares.values()), 1)
            require(bool(good), "shares", dict(shares), "they must be positive with sum 1")
        self._shares = shares
        self._held_out_fraction, self._held_out_bytes = held_out_fraction, held_out_bytes
        groups = {"": 1.0} if shares is None else shares
        self._drawn = {language: _Smallest(int(share * sample_bytes)) for language, share in groups.items()}
        self._held_out: dict[str, _Smallest] = {}
        self._counts: dict[str, LanguageCounts] = {}

    def add(self, text: str, language: str, weight: float = 1.0) -> None:
        """Adds a document. Raises ValueError if `weight` is negative or not finite."""
        require(math.isfinite(weight) and weight >= 0, "weight", weight, "it must be at least 0")
        count = self._counts.setdefault(language, LanguageCounts())
        count.documents += 1
        count.bytes += len(text.encode())
        group = language if self._shares is not None else ""
        if not text:
            count.empty_documents += 1
        elif split_of(text, self._held_out_fraction) == "validation":
            count.held_out_documents += 1
            self._held_out.setdefault(language, _Smallest(self._held_out_bytes)).add(_uniform(text), language, text)
        elif weight == 0:
            count.unweighted_documents += 1
        elif group in self._drawn:
            self._drawn[group].add(_uniform(text) / weight, language, text)

    def finish(self) -> TokenizerSample:
        """The sample. Raises ValueError if no text is left to train on, or none of a language with a share."""
        texts = []
        for group, smallest in sorted(self._drawn.items()):
            if not smallest:
                which = f" in language {group!r}, which has a share" if group else ""
                there = ", ".join(sorted(self._counts)) or "none"
                raise ValueError(f"documents are not valid: none is for training{which}; languages found: {there}.")
            for language, text, was_cut in smallest.sorted(cut=True):
                count = self._counts[language]
                count.drawn_documents += 1
                count.drawn_bytes += len(text.encode())
                count.cut_documents += was_cut
                texts.append(text)
            if self._shares is not None:
                self._counts[group].asked_bytes = smallest.budget
        return TokenizerSample(
            texts,
            {
                language: [text for _, text, _ in smallest.sorted(cut=False)]
                for language, smallest in sorted(self._held_out.items())
            },
            dict(sorted(self._counts.items())),
        )


class _Smallest:
    """The texts with the smallest keys that together reach `budget` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._bytes = 0
        self._heap: list[tuple[float, str, str, int]] = []
        """(-key, language, text, bytes): the largest key first."""

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, key: float, language: str, text: str) -> None:
        if self._bytes >= self.budget and -key < self._heap[0][0]:
            return
        size = len(text.encode())
        heapq.heappush(self._heap, (-key, language, text, size))
        self._bytes += size
        while self._bytes - self._heap[0][3] >= self.budget:
            self._bytes -= heapq.heappop(self._heap)[3]

    def sorted(self, *, cut: bool) -> list[tuple[str, str, bool]]:
        """(language, text, whether it was cut) by key; `cut` shortens the last text to the budget."""
        found = [(language, text, False) for _, language, text, _ in sorted(self._heap, reverse=True)]
        if cut and self._bytes > self.budget:
            language, text, _ = found.pop()
            content = text.encode()
            kept = content[: len(content) - (self._bytes - self.budget)].decode(errors="ignore")
            found += [(language, kept, True)] if kept else []
        return found


def _uniform(text: str) -> float:
    """A hash of the text in (0, 1], independent of the one that holds out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"tokenizer sample"[:16]).digest()
    return (int.from_bytes(digest, "little") + 1) / 2**64
