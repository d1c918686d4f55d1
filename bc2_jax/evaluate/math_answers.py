"""Extracts and compares answers to mathematical questions.

Answers are compared as strings after normalization by RULES (named NORMALIZER), as in the Minerva and OpenCompass
scripts, without algebra: 2x + 1 and 1 + 2x differ. Other scripts' rules differ by several points on MATH.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

NORMALIZER = "bc2-math-1"  # name of RULES; it changes with them
_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?P<bare>[^\s${}\\]+))")
_FINAL = re.compile(r"(?:final )?answer is:?\s*(.*?)(?:\.?\s*I hope it is correct|\.\s|\.?\s*$|\n)", re.I)
_INTEGER = r"[-+]?\d+"
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?|[-+]?\.\d+")
_FRACTION = re.compile(rf"(?P<sign>[-+]?)\\frac\{{(?P<top>{_INTEGER})\}}\{{(?P<bottom>{_INTEGER})\}}")
_LONGEST_NUMBER = 1000  # Python refuses to read integers of thousands of digits
_UNITS = (
    "degrees?|deg|percent|dollars?|cents?|cm|mm|km|m|ft|feet|foot|in|inch(?:es)?|miles?|mi|meters?|units?|mph|hours?|"
    "hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|grams?|kg|ml|liters?|pounds?|ounces?|square|sq|"
    "cubic|points?|ways?|people|students?|sides?|bases?|per"
)


def find_answer(solution: str) -> str:
    r"""The content of the last complete \boxed{}, else the text after the last "answer is" in its sentence, else ""."""
    box = last_box(solution)
    if box is not None:
        return box
    found = _FINAL.findall(solution)
    return found[-1].strip() if found else ""


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...}, \fbox{...} or \boxed 5 whose braces are closed."""
    for match in reversed(list(_BOX.finditer(text))):
        if match["bare"]:
            return match["bare"]
        end = _closing_brace(text, match.end())
        if end is not None:
            return text[match.end() : end].strip()
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`."""
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":
            place += 1  # \{ and \} are printed braces
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if not depth:
                return place
        place += 1
    return None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal and not empty after RULES."""
    normal = normalize(one)
    return bool(normal) and normal == normalize(other)


def normalize(answer: str) -> str:
    """Applies RULES in their order."""
    for rule in RULES.values():
        answer = rule(answer)
    return answer


def _replace(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[str], str]:
    compiled = [(re.compile(pattern), by) for pattern, by in pairs]

    def rule(answer: str) -> str:
        for pattern, by in compiled:
            answer = pattern.sub(by, answer)
        return answer

    return rule


def _unwrap(answer: str) -> str:
    """$5$, \\(5\\), \\[5\\], \\boxed{5} -> 5, also without a final full stop."""
    before = None
    while answer != before:
        before = answer
        answer = answer.strip()
        if answer.endswith(".") and not answer.endswith("\\."):
            answer = answer[:-1]
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if (
                answer.startswith(opening)
                and answer.endswith(closing)
                and len(answer) >= len(opening) + len(closing)
                and not answer.endswith(r"\$")
            ):
                answer = answer[len(opening) : len(answer) - len(closing)]
        match = _BOX.match(answer)
        if match and not match["bare"] and _closing_brace(answer, match.end()) == len(answer) - 1:
            answer = answer[match.end() : -1]
    return answer


def _drop_texts(answer: str) -> str:
    r"""Drops \text{cm}^2 after a value (its unit); keeps text that is the whole answer or comes first."""
    pattern = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}(\^\{?\d\}?)?")

    def replace(match: re.Match[str]) -> str:
        if re.fullmatch(r"[\s,]*(?:and|or)?[\s,]*", match[1]) and match[1].strip():
            return ","
        before = answer[: match.start()].strip()
        is_unit = re.search(r"[\d})\]]$|\\pi$|[a-z]$", before) and re.search("[A-Za-z]", match[1])
        return "" if is_unit else match[1] + (match[2] or "")

    return pattern.sub(replace, answer)


def _drop_units(answer: str) -> str:
    """5 cm^2, 12 square units -> 5, 12: known unit words after a number."""
    pattern = re.compile(rf"(?<=[\d}}])((?:\s|\\[ ,;])*\b(?:{_UNITS})\b\.?(?:\^\{{?\d\}}?)?)+\s*$", re.I)
    return pattern.sub("", answer)


def _complete_arguments(answer: str) -> str:
    r"""\frac12, \frac1{2}, \sqrt2 -> with braces; a/b of whole numbers -> \frac{a}{b}."""
    argument = r"(\{(?:[^{}]|\{[^{}]*\})*\}|[^\s{}\\])"

    def braces(text: str) -> str:
        return text if text.startswith("{") else f"{{{text}}}"

    answer = re.sub(rf"\\frac\s*{argument}\s*{argument}", lambda m: rf"\frac{braces(m[1])}{braces(m[2])}", answer)
    answer = re.sub(r"\\sqrt\s*([^\s{\[\\])", r"\\sqrt{\1}", answer)
    whole = re.fullmatch(rf"\s*({_INTEGER})\s*/\s*({_INTEGER})\s*", answer)
    return rf"\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else answer


def _join_thousands(answer: str) -> str:
    """1,000 and 1{,}000 -> 1000, if that is the whole answer: (1,234) is a point."""
    answer = answer.replace("{,}", ",")
    return answer.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", answer) else answer


def _evaluate(answer: str) -> str:
    r"""Numbers and fractions of whole numbers in lowest terms: 5.0 -> 5, .5 and \frac{2}{4} -> \frac{1}{2}."""
    match = _FRACTION.fullmatch(answer)
    if len(answer) > _LONGEST_NUMBER:
        return answer
    if match and int(match["bottom"]):
        value = Fraction(int(match["top"]), int(match["bottom"])) * (-1 if match["sign"] == "-" else 1)
    elif _NUMBER.fullmatch(answer):
        value = Fraction(answer)
    else:
        return answer
    sign = "-" if value < 0 else ""
    top, bottom = abs(value.numerator), value.denominator
    return f"{sign}{top}" if bottom == 1 else rf"{sign}\frac{{{top}}}{{{bottom}}}"


RULES: dict[str, Callable[[str], str]] = {
    # The sentence, $ and the box around the answer.
    "unwrap": _unwrap,
    # LaTeX spaces; \\ separates rows of a matrix and stays.
    "spacing": _replace((r"(?<!\\)\\[,;:! ]", " "), (r"\\q?quad\b|~", " ")),
    # Bracket sizes and synonyms.
    "spelling": _replace(
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(leq|geq|neq)\b", lambda m: "\\" + m[1][:2]),
        (r"\\times\b", r"\\cdot"),
        (r"\u2212", "-"),
    ),
    # Degrees, percent, money.
    "signs": _replace((r"\^\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree\b|°", ""), (r"\\?%", ""), (r"\\?\$", "")),
    # Units and \text{}.
    "text": _drop_texts,
    "units": _drop_units,
    # x = 5, f(x) = 5, x \in [0, 1] -> the right-hand side.
    "left side": _replace((r"^\s*[A-Za-z](?:_\{?\w\}?)?(?:\([A-Za-z]\))?\s*(?:=|\\in\b)(?!.*=)\s*", "")),
    "arguments": _complete_arguments,
    # x_{2}, x^{2} -> x_2, x^2
    "one in braces": _replace((r"([_^])\{(\w)\}", r"\1\2")),
    "spaces": _replace((r"\s+", "")),
    # (C) -> C
    "option": _replace((r"^\(([A-Z])\)$", r"\1")),
    "thousands": _join_thousands,
    "value": _evaluate,
}
"""Name -> rule, in order of application."""
