"""Classes of prompts for the data of a reward model, in three levels with names and quotas.

The paper has 6, 30 and 200+ classes in three levels (section 3) but does not name them; these are ours. A user's file
in the same format may replace them.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bc2_jax.validation import show

OUR_FILE = Path(__file__).with_name("taxonomy.json")
LEVELS = 3


class PromptClass(NamedTuple):
    """One class of the taxonomy."""

    id: str
    """Unique over all levels."""
    zh: str
    en: str
    path: tuple[str, ...]
    """Ids from the first level down to this class."""
    quota: float
    """Its share of all prompts."""

    @property
    def level(self) -> int:
        """1, 2 or 3."""
        return len(self.path)


class Taxonomy(NamedTuple):
    """Classes in the order of their file, each before those below it."""

    classes: tuple[PromptClass, ...]

    def at(self, level: int) -> tuple[PromptClass, ...]:
        """The classes of a level, 1 to 3."""
        return tuple(c for c in self.classes if c.level == level)

    def find(self, name: Any) -> PromptClass | None:
        """The class with this id, or this Chinese or English name, or None.

        Case, spaces and hyphens are ignored; of several classes the first counts; a path of ids with "/" or "." means
        its last class.
        """
        if not isinstance(name, str):
            return None
        names = _names(self)
        last = re.split(r"[/.]", name)[-1]
        return names.get(_canonical(name)) or names.get(_canonical(last))


@functools.cache
def _names(taxonomy: Taxonomy) -> dict[str, PromptClass]:
    names: dict[str, PromptClass] = {}
    for by in ("id", "zh", "en"):  # ids take precedence over names
        for found in taxonomy.classes:
            names.setdefault(_canonical(getattr(found, by)), found)
    return names


def _canonical(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def load_taxonomy(path: str | Path | None = None) -> Taxonomy:
    """Reads a taxonomy from a JSON file, by default ours: {"classes": [{"id", "zh", "en", "quota", "classes": [...]}]},
    three levels deep; quotas are shares of the parent class.

    Raises FileNotFoundError, or ValueError, naming the class, for a missing id, name or quota, a duplicate id, quotas
    that do not sum to one, and any other number of levels.
    """
    path = OUR_FILE if path is None else Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a taxonomy: {str(error).rstrip('.')}.") from error
    classes = record.get("classes") if isinstance(record, dict) else None
    try:
        found = tuple(_read(classes, (), 1.0))
        ids = [c.id for c in found]
        if twice := next((c for c in ids if ids.count(c) > 1), None):
            raise ValueError(f"the id {twice!r} is not unique")
    except ValueError as error:
        raise ValueError(f"{path} is not a taxonomy: {error}.") from None
    return Taxonomy(found)


def _read(classes: Any, above: tuple[str, ...], quota: float) -> Iterator[PromptClass]:
    where = f"the classes of {'/'.join(above)!r}" if above else "the classes"
    if not isinstance(classes, list) or not classes or not all(isinstance(c, dict) for c in classes):
        raise ValueError(f"{where} must be a list of objects, at least one")
    for c in classes:
        name = c.get("id")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
            raise ValueError(f"{where} have the id {show(name)}; it must be a-z, 0-9 and _")
        if not all(isinstance(c.get(key), str) and c[key].strip() for key in ("zh", "en")):
            raise ValueError(f"{name!r} must have names, zh and en")
        share = c.get("quota")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"{name!r} has the quota {show(share)}; it must be above 0 and at most 1")
        if ("classes" in c) == (len(above) + 1 == LEVELS):
            raise ValueError(f"{name!r} is on level {len(above) + 1}; exactly {LEVELS} levels are needed")
    if not math.isclose(total := math.fsum(c["quota"] for c in classes), 1, abs_tol=1e-9):
        raise ValueError(f"the quotas of {where} sum to {total:.12g}, not to 1")
    for c in classes:
        path = (*above, c["id"])
        yield PromptClass(c["id"], c["zh"], c["en"], path, quota * c["quota"])
        if len(path) < LEVELS:
            yield from _read(c["classes"], path, quota * c["quota"])


def plan_samples(taxonomy: Taxonomy, count: int) -> dict[str, int]:
    """Number of prompts, of `count`, for each class of the last level, by id: its quota, rounded by largest remainders
    so that they sum to `count`. Raises ValueError for a negative count."""
    if count < 0:
        raise ValueError(f"count = {count} is not valid: it must be at least 0.")
    leaves = taxonomy.at(LEVELS)
    exact = [count * leaf.quota for leaf in leaves]
    numbers = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(leaves)), key=lambda i: (numbers[i] - exact[i], i))
    for i in order[: count - sum(numbers)]:
        numbers[i] += 1
    return {leaf.id: number for leaf, number in zip(leaves, numbers, strict=True)}
