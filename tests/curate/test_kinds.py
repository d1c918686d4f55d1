from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.curate.kinds import KINDS, kind_of

LINES = Path(__file__).with_name("data").joinpath("pages.jsonl").read_text("utf-8").split("\n")
PAGES = [json.loads(line) for line in LINES if line]


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [({"code"}, "code"), ({"math"}, "mathematics"), ({"news", "wiki", "medical", "fiction"}, "prose")],
)
def test_pages_have_their_kind(kinds, kind):
    """Whatever the language was taken for: code by `kind_of` itself. LaTeX may be either."""
    found = [(page["id"], kind_of(page["text"], "en")) for page in PAGES if page["kind"] in kinds]
    right = [one for one in found if one[1] == kind or (kind == "mathematics" and one[1] == "code")]
    assert len(right) >= 0.9 * len(found) > 5, sorted(set(found) - set(right))


def test_lists_verse_and_dialogue_are_lines():
    kinds = ("recipe", "lyrics", "cv", "table")
    found = [kind_of(page["text"], "en") for page in PAGES if page["kind"] in kinds and page["text"].count("\n") > 3]
    assert found.count("lines") >= 0.8 * len(found) > 5


def test_code_by_language_and_nothing():
    assert kind_of("x9 = [1, 2]", "code") == "code" and kind_of("Some words.", "en") == "prose"
    assert kind_of("", "en") == kind_of(" \n \n", "zh") == "prose"


@settings(max_examples=40)
@given(st.text("a1 =:;{}-\n中。\\$|", max_size=200), st.sampled_from(["en", "zh"]))
def test_any_text_has_a_kind(text, language):
    assert kind_of(text, language) in KINDS
