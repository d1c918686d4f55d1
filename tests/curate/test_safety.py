"""Keywords against plain searches; scores; the audit log. The words are neutral."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.quality import train_quality
from bc2_jax.curate.safety import KeywordFile, KeywordMatcher, SafetyConfig, audit_table, find_harmful
from bc2_jax.curate.tokens import hash_tokens


def found(matcher: KeywordMatcher, texts: list[str]) -> list[tuple[int, str]]:
    return [(f.document, f.keyword) for f in matcher.find(texts)]


def test_latin_is_found_as_words_and_han_in_any_text():
    matcher = KeywordMatcher({"fruit": ["apple", "green apple pie", "苹果", "红苹果派很好吃", "apple树"]})
    texts = [
        "An Apple a day", "pineapple, apples", "我爱apple。", "青苹果真好", "GREEN\n apple  pie!", "红苹果派很好吃",
        "apple树", "xapple树", "",
    ]  # fmt: skip
    assert found(matcher, texts) == [
        (0, "apple"), (2, "apple"), (3, "苹果"), (4, "apple"), (4, "green apple pie"), (5, "苹果"),
        (5, "红苹果派很好吃"), (6, "apple"), (6, "apple树"),
    ]  # fmt: skip


def test_signs_in_a_keyword_are_literal():
    matcher = KeywordMatcher({"languages": ["c++", ".net"]})
    assert found(matcher, ["use c++ now", "use c now", "asp.net", "a .NET b", "net"]) == [
        (0, "c++"), (2, ".net"), (3, ".net"),
    ]  # fmt: skip


def test_case_counts_if_asked():
    texts = ["Apple", "apple"]
    assert found(KeywordMatcher({"f": ["apple"]}, case_sensitive=True), texts) == [(1, "apple")]
    assert found(KeywordMatcher({"f": ["APPLE"]}), texts) == [(0, "APPLE"), (1, "APPLE")]


KEYWORDS = ["ab", "a b", "b a b a", "中", "中国", "国中国中"]


@given(st.lists(st.text("ab 中国,B", max_size=12), max_size=6))
def test_keywords_are_those_of_a_plain_search(texts):
    expected = []
    for i, text in enumerate(texts):
        for word in KEYWORDS:
            pattern = r"\s+".join(word.split())
            if word[0].isascii():
                pattern = rf"(?<![ab]){pattern}(?![ab])"
            expected += [(i, word)] if re.search(pattern, text.lower()) else []
    assert found(KeywordMatcher({"all": KEYWORDS}), texts) == expected
    han = KeywordMatcher({"all": [word for word in KEYWORDS if not word.isascii()]})
    assert han.find(texts, hash_tokens(texts)) == han.find(texts)


def test_files_are_read_by_category_and_decide_with_the_model(tmp_path):
    (tmp_path / "fruit.txt").write_text("# neutral words\napple\n\n苹果\n", encoding="utf-8")
    (tmp_path / "birds.txt").write_text("heron\n", encoding="utf-8")
    safe = [f"a calm day number {i} by the sea" for i in range(40)]
    harmful = [f"a loud noise number {i} in the street" for i in range(40)]
    train_quality(safe, harmful).save(tmp_path / "model.npz")
    config = SafetyConfig(
        keywords=(
            KeywordFile(category="fruit", path=str(tmp_path / "fruit.txt")),
            KeywordFile(category="birds", path=str(tmp_path / "birds.txt")),
        ),
        model=str(tmp_path / "model.npz"),
        min_keywords=2,
    )
    texts = [
        "a calm day by the sea with an apple",
        "a calm day by the sea with an Apple and a HERON",
        "a loud noise in the street",
        "a calm day by the sea",
    ]
    flagged, findings = find_harmful(texts, config)
    assert flagged.tolist() == [False, True, True, False]
    assert [(f.document, f.category, f.keyword) for f in findings] == [
        (0, "fruit", "apple"), (1, "fruit", "apple"), (1, "birds", "heron"), (2, "model", None),
    ]  # fmt: skip
    assert "Apple" in findings[1].excerpt and findings[3].excerpt == texts[2] and findings[3].score < 0.5
    table = audit_table(findings, np.array([70, 71, 72, 73]))
    assert table.column_names == ["doc", "category", "keyword", "score", "excerpt"]
    assert table["doc"].to_pylist() == [70, 71, 71, 72]
    assert table["score"].null_count == 3 and table["keyword"].null_count == 1
    empty = audit_table([], np.array([1]))
    assert empty.schema == table.schema and empty.num_rows == 0


def test_without_keywords_and_model_nothing_is_harmful():
    flagged, findings = find_harmful(["anything", ""], SafetyConfig())
    assert flagged.tolist() == [False, False] and findings == []


def test_bad_keywords_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="safety.keywords = '!!' is not valid: "):
        KeywordMatcher({"a": ["!!"]})
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for name in ("missing.txt", "empty.txt"):
        config = SafetyConfig(keywords=(KeywordFile(category="a", path=str(tmp_path / name)),))
        with pytest.raises(ValueError, match="safety.keywords.path = .* is not valid: "):
            KeywordMatcher.read(config)
    for fields in (dict(min_keywords=0), dict(min_score=2.0), dict(action="keep")):
        with pytest.raises(ValueError, match=f"safety.{next(iter(fields))} = .* is not valid: "):
            SafetyConfig(**fields)
