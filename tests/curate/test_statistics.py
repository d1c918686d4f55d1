"""Statistics against plain Python on each text alone."""

from __future__ import annotations

import dataclasses
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.statistics import Statistics, count_stop_words, measure
from bc2_jax.curate.tokens import hash_tokens

ALPHABET = "aB é中国，。.-•*# \t\n\n　0159…!ﬀ"
TEXTS = st.lists(st.text(ALPHABET, max_size=60), max_size=8)


def statistics(texts: list[str]) -> Statistics:
    return measure(texts, hash_tokens(texts))


def reference(text: str) -> dict[str, float]:
    space = sum(c.isspace() for c in text)
    category = [unicodedata.category(c) for c in text]
    letters = sum(c[0] in "LM" or c in ("Nl", "No") for c in category)
    digits = category.count("Nd")
    han = sum("\u4e00" <= c <= "\u9fff" for c in text)
    lines = [line for line in text.split("\n") if line.strip()]
    stripped = [line.rstrip() for line in lines]
    seen: set[str] = set()
    repeated = []
    for line, kept in zip(lines, stripped, strict=True):
        repeated += [kept] if line in seen else []
        seen.add(line)
    count, characters = max(len(lines), 1), max(sum(map(len, stripped)), 1)
    visible = max(len(text) - space, 1)
    return {
        "characters": len(text),
        "letter_share": letters / visible,
        "digit_share": digits / visible,
        "symbol_share": sum(c in "•*#" for c in text) / visible,
        "space_share": space / max(len(text), 1),
        "han_share": han / max(letters, 1),
        "line_length": sum(map(len, stripped)) / count,
        "longest_line": max(map(len, stripped), default=0),
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in stripped) / count,
        "bullet_lines": sum(line.strip()[0] in "-•*" and len(line.strip()) > 1 for line in stripped) / count,
        "duplicate_lines": len(repeated) / count,
        "duplicate_line_characters": sum(map(len, repeated)) / characters,
    }


@given(TEXTS)
def test_statistics_are_those_of_plain_loops(texts):
    found = statistics(texts)
    for i, text in enumerate(texts):
        for name, value in reference(text).items():
            assert getattr(found, name)[i] == pytest.approx(value), name


@given(TEXTS)
def test_a_document_has_the_same_statistics_in_any_company(texts):
    together = statistics(texts)
    for i, text in enumerate(texts):
        alone = statistics([text])
        for field in dataclasses.fields(Statistics):
            assert getattr(together, field.name)[i] == getattr(alone, field.name)[0], field.name


def test_long_stretches_are_counted():
    texts = ["中" * 3000 + "1" * 2000, "", "x" * 70_000]
    found = statistics(texts)
    np.testing.assert_allclose(found.digit_share, [0.4, 0, 0])
    np.testing.assert_allclose(found.han_share, [1, 0, 0])
    assert found.longest_line.tolist() == [5000, 0, 70_000]
    assert found.tokens.tolist() == [3001, 0, 1]


@pytest.mark.parametrize(
    "garbled",
    [
        "caf\ufffd",
        "锟斤拷锟斤拷",
        "烫烫烫烫",
        "屯屯屯屯",
        "café naïve".encode().decode("latin-1"),
        "“quoted” — it’s".encode().decode("cp1252", "replace"),
        "中文，".encode().decode("latin-1"),
        "你好，这是什么？。".encode().decode("gbk", "replace"),
    ],
)
def test_wrong_decodings_are_garbled(garbled):
    assert statistics([garbled]).garbled_share[0] > 0.05


@pytest.mark.parametrize(
    "text",
    [
        "Café, naïve, Ünïcödé, São Paulo, Œuvre, Ångström, Ärger, Straße; «déjà vu» à Noël.",
        "水太烫了，屯田，拷贝。测试：中文标点“引号”——破折号……",
        "déclarât, señor, Đà Nẵng, NÃO É",
        "20 °C ± 3 µm, § 5, ½ × ¾, £5, © 2020",
    ],
)
def test_accents_are_not_garbled(text):
    assert statistics([text]).garbled_share[0] == 0


def test_stop_words_are_counted_once_whole_and_with_a_capital():
    texts = ["The cat and the dog", "theme other band", "", "the be to of and that have with", "THE To"]
    assert count_stop_words(hash_tokens(texts)).tolist() == [2, 0, 0, 8, 1]
