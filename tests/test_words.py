"""Words of the glossary (docs/design.md) in code, messages and documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AVOIDED = {
    r"\b(go|goes|going|went) on\b": "resume or continue",
    r"\banew\b": "again",
    r"\bthat is there\b": "existing",
    r"\bgone behind\b": "rewound",
}
FILES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "bc2_jax/**/*.py",
        "tools/*",
        "configs/**/*.py",
        "benchmarks/*.py",
        "train.py",
    )
    for path in ROOT.glob(pattern)
    if path.is_file()
)


@pytest.mark.parametrize("pattern", AVOIDED)
def test_the_fields_words_are_used(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"say {AVOIDED[pattern]}: {found}"
