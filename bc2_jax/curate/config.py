"""What a curation run does, with every threshold."""

from __future__ import annotations

import dataclasses
from typing import Any

from bc2_jax.validation import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiesConfig:
    """Which copies go (paper section 2.1): of whole documents, of their paragraphs and sentences, and near copies."""

    exact: bool = True
    """Drop documents whose normalised text occurred before."""
    shortest_paragraph: int = 40
    """Characters of the shortest paragraph that is cut where it occurred before; 0 cuts none."""
    shortest_sentence: int = 40
    """The same for sentences."""
    sentence_copies: int = 4
    """A sentence is cut, but for the first, if it occurs at least so often in all documents."""
    whole_languages: tuple[str, ...] = ("code",)
    """Languages whose documents are never cut into."""
    least_left: float = 0.3
    """A document of which a smaller share is left after cutting is dropped."""
    least_left_bytes: int = 100
    """A document that was cut and is shorter is dropped."""
    near: bool = True
    """Drop near copies that MinHash finds."""
    least_similarity: float = 0.5
    """Near copies have an estimated Jaccard similarity of five-token shingles of at least this to the one that stays."""

    def __post_init__(self) -> None:
        require_positive(self, "copies.", "shortest_paragraph", "shortest_sentence")
        require(self.sentence_copies >= 2, "copies.sentence_copies", self.sentence_copies, "it must be at least 2")
        for field in ("least_left", "least_similarity"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"copies.{field}", value, "it must be in 0..1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """A run of tools/curate.py."""

    copies: CopiesConfig = dataclasses.field(default_factory=CopiesConfig)

    def filter_settings(self) -> dict[str, Any]:
        return {}
