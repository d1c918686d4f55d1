"""Each rule drops the text it is for and keeps ordinary text; the score falls near a limit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.heuristics import HeuristicsConfig, Limits, examine
from bc2_jax.curate.tokens import hash_tokens

CONFIG = HeuristicsConfig()
ENGLISH = (
    "The harbour lay quiet under a thin fog, and the boats that had come in at dawn were still unloading.\n"
    "Children ran along the wall to look for crabs between the stones, while their mothers mended nets.\n"
    "Nobody spoke of the storm, which had taken two roofs and a mast the week before.\n"
)
POEM = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。\n"
OFF = {field.name: None for field in dataclasses.fields(Limits) if "ngrams" not in field.name}
NOTHING = Limits(**OFF, top_ngrams=(), duplicate_ngrams=())


def reason(text: str, language: str = "other", **limits) -> str | None:
    config = HeuristicsConfig(other=dataclasses.replace(NOTHING, **limits)) if limits else CONFIG
    return examine([text], [language], config).reasons[0]


@pytest.fixture
def running_text(monkeypatch):
    """Judges every document as running text."""
    monkeypatch.setattr("bc2_jax.curate.heuristics.kind_of", lambda text, language: "prose")


def test_ordinary_documents_stay(modules):
    texts = [ENGLISH, POEM, *modules]
    assert examine(texts, ["en", "zh"] + ["code"] * len(modules), CONFIG).reasons == [None] * len(texts)


@pytest.mark.parametrize(
    ("limits", "bad"),
    [
        (dict(min_characters=5), "four"),
        (dict(max_characters=3), "four"),
        (dict(min_tokens=3), "two words"),
        (dict(max_tokens=1), "two words"),
        (dict(min_letter_share=0.5), "1 2 3 a"),
        (dict(max_symbol_share=0.3), "## {} a"),
        (dict(max_digit_share=0.5), "a 1234"),
        (dict(max_space_share=0.5), "a    b"),
        (dict(max_garbled_share=0.1), "caf\ufffd"),
        (dict(min_han_share=0.3), "abcdefg 中"),
        (dict(min_stop_words=2), "the the cat"),
        (dict(min_word_length=3), "a b c dd"),
        (dict(max_word_length=10), "incomprehensibility"),
        (dict(min_line_length=4), "ab\ncd\n"),
        (dict(max_line_length=4), "abcdefgh\nab\n\n"),
        (dict(max_longest_line=5), "abcdef\na\n"),
        (dict(max_ellipsis_lines=0.3), "read more...\nand more…\nend\n"),
        (dict(max_bullet_lines=0.6), "- a\n• b\nc\n"),
        (dict(max_duplicate_lines=0.3), "same\nsame\nother\nsame\n"),
        (dict(max_duplicate_line_characters=0.3), "a longer line\na longer line\nx\n"),
    ],
)
def test_every_rule_names_itself_its_value_and_its_limit(limits, bad, running_text):
    ((name, limit),) = limits.items()
    if name == "min_stop_words":
        bad = bad + " sat" * 40
    found = reason(bad, **limits)
    assert found is not None and found.startswith(f"{name} = ") and found.endswith(f"limit {limit:g}")
    # Wider by far, the same document stays.
    wide = 0 if name.startswith("min") else 1 if isinstance(limit, float) else 1000
    assert reason(bad, **{name: wide}) is None


@pytest.mark.parametrize("language", ["zh", "en", "code", "fr"])
def test_all_rules_can_be_switched_off(language):
    config = HeuristicsConfig(zh=NOTHING, en=NOTHING, code=NOTHING, other=NOTHING)
    verdicts = examine(["\ufffd\ufffd", "1", ""], [language] * 3, config)
    assert verdicts.reasons == [None] * 3
    np.testing.assert_array_equal(verdicts.scores, 1)


def test_repetition_is_for_documents_of_some_length():
    limits = dataclasses.replace(NOTHING, top_ngrams=((2, 0.3), (4, 0.2)), duplicate_ngrams=((5, 0.4), (10, 0.2)))
    config = HeuristicsConfig(other=limits, repetition_tokens=20)
    varied = " ".join(f"w{i}" for i in range(60))
    four = "a b c d " * 5 + " ".join(f"w{i}" for i in range(60))  # the 2-gram covers 10 / 80, the 4-gram 20 / 80
    ten = varied + " " + " ".join(f"w{i}" for i in range(20))  # 20 of 80 tokens occurred before
    texts = ["buy now " * 9, "buy now " * 10, varied, four, varied + " " + varied, ten]
    reasons = examine(texts, ["fr"] * len(texts), config).reasons
    assert [r and r.split(" ")[0] for r in reasons] == [
        None, "top_ngrams(2)", None, "top_ngrams(4)", "duplicate_ngrams(5)", "duplicate_ngrams(10)",
    ]  # fmt: skip


def test_the_first_broken_rule_is_given():
    assert reason("1", min_characters=5, min_letter_share=0.5) == "min_characters = 1, limit 5"


def test_limits_are_those_of_the_language():
    config = HeuristicsConfig(zh=dataclasses.replace(NOTHING, min_characters=5))
    texts = ["四个字。"] * 3
    assert [r is None for r in examine(texts, ["zh", "en", "fr"], config).reasons] == [False, False, False]
    config = dataclasses.replace(config, en=NOTHING, other=dataclasses.replace(NOTHING, max_characters=3))
    found = examine(texts, ["zh", "en", "fr"], config).reasons
    assert found == ["min_characters = 4, limit 5", None, "max_characters = 4, limit 3"]


@given(st.lists(st.sampled_from([ENGLISH, POEM, "", "1", "a b " * 40, ENGLISH * 3, "x\ny\n" * 9]), max_size=9))
def test_verdicts_do_not_depend_on_the_company(texts):
    languages = ["en" if text.isascii() else "zh" for text in texts]
    together = examine(texts, languages, CONFIG)
    shared = examine(texts, languages, CONFIG, hash_tokens(texts))
    assert together.reasons == shared.reasons
    np.testing.assert_array_equal(together.scores, shared.scores)
    assert ((together.scores >= 0) & (together.scores <= 1)).all() and together.scores.dtype == np.float32
    for i, (text, language) in enumerate(zip(texts, languages, strict=True)):
        alone = examine([text], [language], CONFIG)
        assert alone.reasons[0] == together.reasons[i] and alone.scores[0] == together.scores[i]
        assert (together.scores[i] == 0) == (together.reasons[i] is not None)


def test_the_score_falls_towards_a_limit():
    config = HeuristicsConfig(other=dataclasses.replace(NOTHING, max_digit_share=0.5, min_characters=2))
    texts = ["abcdefghij", "abcdefghi1", "abcdefg123", "abcdef1234", "abc1234567"]
    scores = examine(texts, ["fr"] * 5, config).scores
    np.testing.assert_allclose(scores, np.sqrt([0.8 * m for m in (1, 0.8, 0.4, 0.2, 0)]), atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_characters", -1),
        ("max_symbol_share", 1.5),
        ("max_duplicate_lines", 2.0),
        ("max_tokens", 3),
        ("top_ngrams", ((4, 0.2), (2, 0.2))),
        ("duplicate_ngrams", ((1, 0.2),)),
        ("duplicate_ngrams", ((5, 0.0),)),
    ],
)
def test_bad_limits_are_named(field, value):
    with pytest.raises(ValueError, match=f"heuristics.{field} = .* is not valid: "):
        Limits(**{"min_tokens": 4, field: value})
