"""Rewards that can be checked: what they find in text, in both languages."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.align import checkable


def test_the_language_of_an_answer():
    prompts = ["How are you?", "你好吗？", "Translate 你好 into English please", "Translate 你好 into English please"]
    answers = ["Fine, thank you.", "I am fine.", "Hello!", "你好"]
    rows = [{}, {}, {}, {"language": "zh"}]
    assert checkable.same_language(prompts, answers, rows) == [1, 0, 1, 1]
    assert checkable.same_language(["Hello"], ["42 !?"], [{}]) == [0]
    assert [checkable.language_of(text) for text in ("", "123", "naïve", "他用 Python 写代码")] == ["", "", "en", "zh"]


def test_the_length_of_an_answer():
    assert checkable.right_length([""] * 5, ["", "ab", "abcd", "abcdef", "x" * 9], [{"length": 4}] * 5) == [
        0, 0.5, 1, 0.5, 0,
    ]  # fmt: skip
    for row in ({}, {"length": 0}, {"length": "4"}, {"length": True}, {"length": float("nan")}):
        with pytest.raises(ValueError, match="the field `length` of a record is"):
            checkable.right_length(["q"], ["a"], [row])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 + 7 = ?", 19), ("What is (3 - 5) * 4?", -8), ("3加5等于几？", 8), ("１２×３是多少", 36),
        ("计算 7 除以 2", Fraction(7, 2)), ("6 times 7", 42), ("(see below) 2 + 2", 4), ("-3 - -4", 1),
        ("0.1 + 0.2", Fraction(3, 10)), ("what (is 2 + 2)?", 4), ("1 / 0", None), ("no sum, 5 only", None),
        ("2 ** 9", None), ("", None),
    ],
)  # fmt: skip
def test_arithmetic_in_a_question(text, expected):
    assert checkable.calculate(text) == expected


@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6), sign=st.sampled_from("+-*"))
def test_any_arithmetic(a, b, sign):
    right = {"+": a + b, "-": a - b, "*": a * b}[sign]
    question, answers = f"What is {a} {sign} {b}?", [f"It is {right:,}.", f"{right}", f"{right} - no, {right + 1}", "?"]
    assert checkable.right_number([question] * 4, answers, [{}] * 4) == [1, 1, 0, 0]
    assert checkable.right_number(["?"] * 2, answers[1:3], [{"answer": right}] * 2) == [1, 0]


def test_a_question_without_a_number():
    with pytest.raises(ValueError, match="the right number of a record is not known: it has no field `answer`"):
        checkable.right_number(["Hello?"], ["5"], [{}])
    assert checkable.last_number("½") == Fraction(1, 2)
    assert [checkable.last_number(t) for t in ("a1", "v1.5", "1/0", "9" * 5000, "3,5", "1,000.5", "x = -4.")] == [
        None, None, None, None, 5, Fraction(2001, 2), -4,
    ]  # fmt: skip
