"""Normalisation against its definition, character by character."""

from __future__ import annotations

import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from bc2_jax.curate.normalization import large_strings, normalize_texts

ZWNJ, ZWJ, ZWSP, BOM = "\u200c", "\u200d", "\u200b", "\ufeff"
# What the rules are about is rare among all characters.
ODD = st.sampled_from([*" \t\n\r\v\f\x00\x1b\x7f\x85\xa0\xade\u0301\u3000", "\r\n", "\n\n\n", ZWNJ, ZWJ, ZWSP, BOM,
                       "\u2028", "\u2029", "\u0915", "\u0645", "\U0001f468", "\u00e9", "\u212b", "，", "ｆ", "\u0958",
                       "\u2adc", "\u1100", "\u1161", "\u2000"])  # fmt: skip
TEXT = st.lists(st.one_of(ODD, st.characters(exclude_categories=["Cs"]))).map("".join)


def normalize(text: str) -> str:
    return normalize_texts([text])[0][0]


def removed(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) == "Cc"


@given(TEXT)
@example("a" + ZWSP + "\u0301\u0323")
@example(" \r \r\n\x0b \n\nx \x00\n")
def test_is_idempotent(text: str):
    assert normalize(normalize(text)) == normalize(text)


@given(TEXT)
def test_the_result_is_normal(text: str):
    result = normalize(text)
    assert unicodedata.normalize("NFC", result) == result
    assert not any(removed(c) or c in "\u2028\u2029" + ZWSP + BOM for c in result)
    assert "\n\n\n\n" not in result
    assert not result.startswith("\n")
    assert all(line == line.rstrip(" \t\u3000\xa0") for line in result.split("\n"))


@given(TEXT)
def test_nothing_that_can_be_seen_is_lost(text: str):
    def seen(text: str) -> str:
        # Format characters are invisible; marks may be composed.
        kept = (c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf"))
        return unicodedata.normalize("NFD", "".join(c for c in kept if c not in "\ufffe\uffff"))

    assert seen(normalize(text)) == seen(text)


@given(st.lists(TEXT))
def test_a_batch_is_its_texts_one_by_one(texts: list[str]):
    assert normalize_texts(texts)[0] == [normalize(text) for text in texts]


def test_line_ends_become_newlines():
    assert normalize("a\r\nb\rc\u2028d\u2029e\x85f\x0bg\x0ch") == "a\nb\nc\nd\ne\nf\ng\nh"


def test_chinese_punctuation_stays_full_width():
    text = "\u3000\u3000他说：“这件事（指迁都），要从长计议！”ＡＢＣ１２３\n\u3000\u3000众人散去……"
    assert normalize(text) == text


def test_letters_are_composed():
    assert normalize("cafe\u0301") == "caf\u00e9"
    assert normalize("e" + ZWSP + "\u0301") == "\u00e9"


def test_joiners_stay_where_they_are_seen():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    heart = "\u2764\ufe0f\u200d\U0001f525"
    persian, hindi = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0915\u094d\u200d\u0937"
    for text in (family, heart, persian, hindi):
        assert normalize(text) == text
    assert normalize(f"zero{ZWJ}width{ZWNJ}") == "zerowidth"


def test_code_keeps_its_layout():
    code = "import a\n\n\ndef f(x):\n\tif x:\n        return {\n            1: 2,\n        }"
    assert normalize(code + "\n") == code


def test_white_space_at_the_ends_and_blank_lines():
    assert normalize("\n \n  first \t\n\n\n\n\n\nsecond  \n\n") == "  first\n\n\nsecond"
    assert normalize(" \n\t\u3000") == ""


def test_counts_documents_by_rule():
    texts = ["clean", "a\r\nb", "x\x00y", "e\u0301 \n", "tail\n", "1\n\n\n\n2", "a" + ZWJ, "b \nc"]
    assert dict(normalize_texts(texts)[1]) == {
        "line ends": 1, "invisible characters": 1, "composition": 1, "outer white space": 2, "blank lines": 1,
        "joiners": 1, "trailing spaces": 1,
    }  # fmt: skip


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_large_strings_holds_the_texts(texts: list[str]):
    column = large_strings(texts)
    column.validate(full=True)
    assert column.to_pylist() == texts


def test_long_runs_take_linear_time():
    """A backtracking pattern would need hours for it."""
    assert normalize("a" + " " * 300_000 + "b\r") == "a" + " " * 300_000 + "b"
