"""Example reward functions that need no model: language, length and last number of an answer.

    --ppo.reward-functions bc2_jax.align.checkable:same_language bc2_jax.align.checkable:right_number

Each is (questions, answers, records) -> floats in 0..1, as in `align/reward_functions.py`.
"""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[^\W\d_{_HAN}]+")
_SIGNS = {"乘以": "*", "除以": "/", "加上": "+", "减去": "-", "乘": "*", "除": "/", "加": "+", "减": "-",
          "plus": "+", "minus": "-", "times": "*", "divided by": "/", "×": "*", "÷": "/", "−": "-"}  # fmt: skip
_EXPRESSION = re.compile(r"[-+(\s]*\d[\d.\s()]*(?:[-+*/][-+(\s]*\d[\d.\s()]*)+")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def same_language(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 if the answer is in the language of the record's field `language` ("zh" or "en"), or else of its question
    (`language_of`); 0 otherwise."""
    asked = [row.get("language") or language_of(prompt) for prompt, row in zip(prompts, rows, strict=True)]
    return [float(language_of(answer) == wanted) for answer, wanted in zip(answers, asked, strict=True)]


def right_length(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 for an answer with as many characters as the record's field `length`, falling linearly to 0 for an empty answer
    and for one twice as long. Raises ValueError if `length` is missing or not positive."""
    return [max(0.0, 1 - abs(len(answer) - n) / n) for answer, n in zip(answers, map(_length, rows), strict=True)]


def right_number(prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 if the last number of the answer is that of the record's field `answer`, or else the value of the arithmetic in
    the question; 0 otherwise. Raises ValueError for a record with neither."""
    rewards = []
    for prompt, answer, row in zip(prompts, answers, rows, strict=True):
        given = row.get("answer")
        wanted = calculate(prompt) if given is None else last_number(str(given))
        if wanted is None:
            found = f"answer = {given!r}" if given is not None else f"no field `answer`, and its question is {prompt!r}"
            raise ValueError(f"the right number of a record is not known: it has {found}")
        rewards.append(float(last_number(answer) == wanted))
    return rewards


def language_of(text: str) -> str:
    """ "zh" if at least half of the words are Han characters, each of which is a word; "en" for other languages; "" for
    text without letters."""
    han, words = len(re.findall(f"[{_HAN}]", text)), len(_WORD.findall(text))
    if not han and not words:
        return ""
    return "zh" if han >= words else "en"


def last_number(text: str) -> Fraction | None:
    """The last number in a text: digits with an optional sign, commas between thousands, a decimal point or a slash."""
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/"))
    try:
        return Fraction(found[-1].replace(",", "")) if found else None
    except (ZeroDivisionError, ValueError):  # Python does not parse thousands of digits
        return None


def calculate(text: str) -> Fraction | None:
    """The exact value of the first arithmetic expression in a text, such as "12 + 3 * (4 - 1)" or "12加3", or None.
    Expressions without a value, such as "1 / 0", are skipped."""
    text = unicodedata.normalize("NFKC", text)
    for word, sign in _SIGNS.items():
        text = text.replace(word, sign)
    for match in _EXPRESSION.finditer(text):
        expression = match[0].strip()
        # Unbalanced parentheses belong to the sentence.
        while expression.count("(") > expression.count(")") and expression.startswith("("):
            expression = expression[1:].strip()
        while expression.count(")") > expression.count("(") and expression.endswith(")"):
            expression = expression[:-1].strip()
        try:
            return _value(ast.parse(expression, mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            continue
    return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")


def _length(row: Mapping[str, Any]) -> float:
    length = row.get("length")
    if isinstance(length, bool) or not isinstance(length, int | float) or not length > 0:
        raise ValueError(f"the field `length` of a record is {length!r}: it must be a positive number")
    return float(length)
