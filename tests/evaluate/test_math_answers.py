"""Where answers stand in solutions, and which ones are the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.evaluate import math_answers
from bc2_jax.evaluate.math_answers import RULES, find_answer, last_box, normalize, same_answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{4} and then \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{7}, then cut off: \boxed{\frac{1}{", "7"),
        (r"\fbox{9}", "9"),
        (r"the set is \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"thus \boxed 5$", "5"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "$[2,5)$"),
        ("The answer is 3. No: the final answer is $4.5$. I hope it is correct.", "$4.5$"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is x + 1\nand so on", "x + 1"),
        ("I do not know.", ""),
        ("", ""),
    ],
)
def test_find_answer(solution, answer):
    assert find_answer(solution) == answer


SAME = {
    "unwrap": [("x.", "x"), (r"\(5\)", "5"), (r"\[5\]", "5"), (r"\boxed{5}", "5")],
    "spacing": [(r"3\,000\;m", "3 000 m"), (r"1\quad 2", "1 2"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",) * 2],
    "spelling": [
        (r"\left( 1, 2 \right)", "(1, 2)"), (r"\dfrac{1}{3}", r"\frac{1}{3}"), (r"\tfrac{1}{3}", r"\frac{1}{3}"),
        (r"x \leq 3", r"x \le 3"), (r"2 \times 3", r"2 \cdot 3"), ("\u22125", "-5"),
    ],
    "signs": [("US$5", "US5"), (r"30^\circ", "30"), ("30°", "30"), (r"50\%", "50"), (r"\$18", "18")],
    "text": [
        (r"10\text{ cm}^2", "10"), (r"\text{even}", "even"), (r"3\pi\mbox{ inches}", r"3\pi"),
        (r"3 \text{ and } 4", "3,4"), (r"\frac{1}{2}\textbf{ hours}", r"\frac{1}{2}"),
    ],
    "units": [("12 square units", "12"), ("5 cm^2", "5"), ("7 miles per hour", "7"), ("20 dollars", "20")],
    "left side": [("x = 5", "5"), ("f(x) = 2x", "2x"), (r"x \in [0, 1]", "[0, 1]"), ("a_1=3", "3")],
    "arguments": [
        (r"\frac12", r"\frac{1}{2}"), (r"\frac1{2}", r"\frac{1}{2}"), (r"\frac{x}2", r"\frac{x}{2}"),
        (r"2\sqrt3", r"2\sqrt{3}"), ("3/4", r"\frac{3}{4}"), (r"\frac\pi2",) * 2,
    ],
    "one in braces": [("11_{2}", "11_2"), ("x^{2}", "x^2")],
    "spaces": [("x + 1", "x+1"), ("( 1 , 2 )", "(1,2)")],
    "option": [("(C)", "C"), (r"\text{(C)}", "C")],
    "thousands": [("1,000", "1000"), ("1{,}234{,}567", "1234567"), (r"11,\! 111", "11111")],
    "value": [
        ("5.0", "5"), ("05", "5"), (".5", r"\frac{1}{2}"), (r"\frac{2}{4}", "0.5"), (r"-\frac{3}{4}", "-0.75"),
        (r"\frac{-1}{3}", r"-\frac{1}{3}"), ("+3", "3"), (r"\frac{6}{3}", "2"),
    ],
}  # fmt: skip


def test_each_rule_has_examples():
    assert SAME.keys() == RULES.keys()


@pytest.mark.parametrize(("rule", "one", "other"), [(rule, *pair) for rule, pairs in SAME.items() for pair in pairs])
def test_same(rule, one, other, monkeypatch):
    assert same_answer(one, other)
    if one != other:  # and it is this rule that makes them the same
        monkeypatch.setattr(math_answers, "RULES", {name: by for name, by in RULES.items() if name != rule})
        assert not same_answer(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "6"), ("", ""), ("", "0"), ("1,2", "12"), ("(1,234)", "1234"), ("x", "y"), (r"\frac{1}{2}", "2"),
        ("-5", "5"), ("2x+1", "1+2x"), ("10", "1"), ("[0,1]", "(0,1)"), ("100_2", "100"), ("5", "5x"),
        (r"\frac{1}{0}", "0"), ("A", "(B)"), ("2^5", "2"),
    ],
)  # fmt: skip
def test_different(one, other):
    assert not same_answer(one, other)


@given(st.text(alphabet="0123456789abx+-*/^_{}()[]$\\., =\u00b0%", max_size=24))
def test_rules_end_and_take_any_text(text):
    assert same_answer(text, text) == bool(normalize(text))
    find_answer(text)


@given(st.fractions(max_denominator=10**6))
def test_values_are_exact(value):
    top, bottom = value.numerator, value.denominator
    assert same_answer(f"{top}/{bottom}", rf"\frac{{{3 * top}}}{{{3 * bottom}}}")
    assert not same_answer(f"{top}/{bottom}", f"{top + 1}/{bottom}")


@given(st.recursive(st.sampled_from(["1", "x", r"\{", "a b"]), lambda part: part.map(lambda p: f"{{{p}}}") | part))
def test_boxes_are_closed_by_their_own_brace(content):
    assert last_box("text } } \\boxed{" + content + "} and } more") == content.strip()


def test_numbers_of_thousands_of_digits():
    assert same_answer("7" * 9000, "7" * 9000)
