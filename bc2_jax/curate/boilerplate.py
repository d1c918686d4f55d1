"""Boilerplate: lines that belong to a web site and not to its text, such as notices of cookies and copyright.

A whole line is removed, and only if it is such a notice and little else: a statute on copyright, a report on a privacy
policy and a licence use the same words in sentences of their own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bc2_jax.validation import require

PHRASES: dict[str, Any] = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))
"""Lists of phrases by rule. The first phrases of boilerplate are C4's (Raffel et al. 2020, section 2.2), which removes
every line with "javascript" and drops pages of "lorem ipsum"."""
_SENTENCE = re.compile(r"[.。;；!！?？][\"'”’）)]*\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoilerplateConfig:
    """Lines to remove. Phrases are found in upper and lower case."""

    phrases: tuple[str, ...] = tuple(PHRASES["boilerplate"]["phrases"])
    """A line that consists of phrases is removed."""
    notices: tuple[str, ...] = tuple(PHRASES["boilerplate"]["notices"])
    """Phrases next to which a line may have a name, if it is not a sentence."""
    around: tuple[str, ...] = tuple(PHRASES["boilerplate"]["around"])
    """Phrases that count only in a line that has one of the others."""
    min_share: float = 0.6
    """Share of a line's letters in phrases from which on it is removed."""
    min_share_notice: float = 0.25
    """The same for a line with a notice that does not end like a sentence."""
    max_characters: int = 160
    """Longer lines stay: they are paragraphs with such a phrase."""
    skip: tuple[str, ...] = ("code",)
    """Languages whose documents are not changed."""

    def __post_init__(self) -> None:
        for field in ("phrases", "notices", "around"):
            value = getattr(self, field)
            require(all(value), f"boilerplate.{field}", value, "a phrase can't be empty")
            require(not any("\n" in phrase for phrase in value), f"boilerplate.{field}", value, "one line each")
        for field in ("min_share", "min_share_notice"):
            require(0 <= getattr(self, field) <= 1, f"boilerplate.{field}", getattr(self, field), "it must be in 0..1")
        require(self.max_characters > 0, "boilerplate.max_characters", self.max_characters, "it must be positive")


class Line(NamedTuple):
    """A line that was removed."""

    document: int
    """Its index among the texts."""
    text: str


def remove_boilerplate(
    texts: Sequence[str], languages: Sequence[str], config: BoilerplateConfig
) -> tuple[list[str], list[Line]]:
    """The texts without boilerplate, and the removed lines by document and place."""
    import pyarrow as pa
    import pyarrow.compute as pc

    result = list(texts)
    removed: list[Line] = []
    chosen = [i for i, language in enumerate(languages) if language not in config.skip]
    deciding = config.phrases + config.notices
    if not deciding or not chosen:
        return result, removed
    # One automaton finds the documents with a phrase; only their lines are tested.
    pattern = _either(deciding)
    strings = pa.array([texts[i] for i in chosen], pa.large_string())
    found = pc.match_substring_regex(strings, pattern, ignore_case=True).to_numpy(zero_copy_only=False)
    decides = re.compile(pattern, re.IGNORECASE)
    notice = re.compile(_either(config.notices) or "(?!)", re.IGNORECASE)
    counted = re.compile(_either(deciding + config.around), re.IGNORECASE)

    def is_boilerplate(line: str) -> bool:
        if len(line) > config.max_characters or not decides.search(line):
            return False
        covered = sum(_letters(match.group()) for match in counted.finditer(line))
        is_notice = notice.search(line) is not None and _SENTENCE.search(line) is None
        return covered >= (config.min_share_notice if is_notice else config.min_share) * _letters(line)

    for k in np.flatnonzero(found).tolist():
        document = chosen[k]
        lines = texts[document].split("\n")
        out = [is_boilerplate(line) for line in lines]
        if any(out):
            result[document] = "\n".join(line for line, goes in zip(lines, out, strict=True) if not goes)
            removed += [Line(document, line) for line, goes in zip(lines, out, strict=True) if goes]
    return result, removed


def _either(phrases: Sequence[str]) -> str:
    """A regular expression; longer phrases first, because the first alternative that matches is taken."""
    return "|".join(map(re.escape, sorted(phrases, key=lambda phrase: (-len(phrase), phrase))))


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))
