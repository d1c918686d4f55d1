"""The kind of a document: running text, code, mathematics, or text whose units are lines.

Only determined for documents that break a limit for running text, so it may be slow. In at most 120 lines of a document
  code         at least .5 of the lines look like a statement, a key with its value, a section, a command, a change of a
               diff; .35 if a line is indented or ends with a bracket
  mathematics  at least .2 of the visible characters are in formulas (digits, operators, relations, Greek, commands of
               LaTeX), with a relation or an operator between two of them in at least one line of four
  lines        at least half of three or more lines have no end of a sentence, or have a mark of a list, a field, a
               speaker, a cell; the median line has at most 80 columns (a Han character has two)
  prose        everything else
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["prose", "code", "mathematics", "lines"]
KINDS: tuple[Kind, ...] = ("prose", "code", "mathematics", "lines")

_MOST_LINES = 120
_CODE_SHARE, _CODE_SHARE_SHAPED = 0.5, 0.35
_FORMULA_SHARE, _FORMULA_LINES = 0.2, 0.25
_WORDY_SHARE = 0.8
_LINES_SHARE, _LONGEST_MEDIAN = 0.5, 80

_SQL = (
    r"(?:SELECT|FROM|WHERE|(?:LEFT |RIGHT |INNER |OUTER )?JOIN|GROUP BY|ORDER BY|HAVING|LIMIT|INSERT INTO|VALUES|"
    r"UPDATE|DELETE FROM|CREATE (?:TABLE|INDEX|VIEW)|ALTER TABLE|DROP TABLE|SET)\b"
)
_CODE_LINE = re.compile(
    r"^\s*(?:"
    r"[^#*].*[;{}\\]|[\]\[(){}]+[;,]?|.*\);?"  # the end of a statement or a block
    r"|(?:def|class|import|from|return|if|elif|else|for|while|try|except|finally|with|case|switch|func|fn|let|var|const|"
    r"static|public|private|protected|struct|enum|type|package|use|mod|export|echo|sudo|cd|git|pip|npm|apt|docker|make)\b"
    r".*[:({\[=\"'/$;-].*|(?:fi|done|esac|end|endif|else|pass|break|continue)"
    rf"|{_SQL}.*"
    r"|(?:FROM|RUN|COPY|ADD|CMD|ENTRYPOINT|ENV|EXPOSE|WORKDIR|VOLUME|ARG|USER) \S+.*"  # a container's recipe
    r"|(?:diff --git|index [0-9a-f]+\.\.|@@ .*@@|\+\+\+ |--- |Index: ).*"
    r"|[-+][ \t]*\S.*[:;(){}\[\]=<>].*|[-+](?![-+ ]).*"
    r"|[#%]\w+.*|//.*|/\*.*|\*/|<[!?/\w][^>]*>.*|@\w+.*"  # directives, comments, markup, decorators
    r"|\[\[?[\w.\"' :-]+\]\]?|\$ .+|>>> .+|[\w./-]+ ?:= ?.*|[A-Za-z_][\w.\[\]\"']* ?[-+*|?]?=(?!=).+|[A-Za-z_][\w.-]*:"
    r"|(?:- )?[\"']?[A-Za-z_][\w./ -]{0,30}[\"']?: ?(?:[\"'\[{|>&*-].*|[\w./:@~^<>=-]+,?)"  # YAML, JSON
    r"|- ?[\"'./\w][^ ]*"
    r"|[\"']?[\w./-]+[\"']?,|\\\w+.*|.*(?:->|=>|::|&&|\|\||</\w).*|\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*"
    r")\s*$"
)
# Half of a formula matches this; hyphens, commas and brackets, which all text has, do not.
_FORMULA = re.compile(
    r"\\[A-Za-z]+|[0-9=+×÷<>≤≥≠≈≡±√∑∏∫∂∞∠△⊥∥∵∴∈⊂∪∩→↑↓←⇒⇔°^_|*/(){}\\$∇·′'∀∃′²³½¼¾①-⑳-]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[α-ωΑ-Ω]|"
    r"(?<![a-z])(?:[A-Z][a-z]?\d*){1,6}(?=[=+→↑↓])"
)
_RELATION = re.compile(
    r"[\w)\]}°′'↑↓%]\s*[=≤≥≠≈<>≡×÷+−*/^_→]+\s*[\w(\[{\\√∠△-]|\\(?:frac|int|sum|lim|sqrt|begin|cdot|nabla|partial|alpha|pi|to|"
    r"mathbb|le|ge|in|cong)\b|\$[^$\n]+\$|[∵∴√∑∫∠△]"
)
_LATEX = re.compile(r"\$[^$\n]*\\[a-z]+[^$\n]*\$|\\begin\{(?:align|equation|gather)")
_LISTED = re.compile(
    r"^\s*(?:[-*+•●○■□◆◇▪·—–※★☆►▶]|\(?\d{1,3}[.)、．,:]|[（(]?[一二三四五六七八九十\d]+[)）、.]|[①-⑳]|[a-zA-Z][.)]\s)"
    r"|^\s*[^\s:：]{1,16}(?: [^\s:：]{1,12}){0,2} ?[:：]|^[A-Z][A-Z .]{1,20}[.:]|\t|\S {2,}\S|\|.*\|"
)
_ENDED = re.compile(r"[.。!！?？…;；][\"'”’」』)）]*\s*$")
_WIDE = re.compile("[\u2e80-\u9fff\uf900-\uffef]")


def kind_of(text: str, language: str) -> Kind:
    """The kind of a document; `language` is a code of `languages`, "code" for programs and markup."""
    lines = [line for line in text[: 100 * _MOST_LINES].split("\n") if line.strip()][:_MOST_LINES]
    if not lines:
        return "prose"
    # LaTeX is often taken for code.
    if _LATEX.search(text) and _is_mathematics(lines):
        return "mathematics"
    if _is_code(lines) or (language == "code" and not _is_wordy(text)):
        return "code"
    if _is_mathematics(lines):
        return "mathematics"
    return "lines" if _is_lines(lines) else "prose"


def _is_wordy(text: str) -> bool:
    """Whether the share of letters is that of prose: documentation of programs is often taken for code."""
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) >= _WORDY_SHARE * len(visible)


def _is_code(lines: list[str]) -> bool:
    if len(lines) < 2:
        return False
    found = sum(_CODE_LINE.match(line) is not None and not _WIDE.search(line[:8]) for line in lines) / len(lines)
    # Prose in code blocks and menus have no indentation and no bracket at the end of a line.
    shaped = any(line[0] in " \t" or line.rstrip()[-1] in "{}[];" for line in lines)
    return found >= (_CODE_SHARE_SHAPED if shaped else _CODE_SHARE)


def _is_mathematics(lines: list[str]) -> bool:
    text = "\n".join(lines)
    if sum(map(len, _FORMULA.findall(text))) < _FORMULA_SHARE * len("".join(text.split())):
        return False
    return sum(_RELATION.search(line) is not None for line in lines) >= max(1, _FORMULA_LINES * len(lines))


def _is_lines(lines: list[str]) -> bool:
    if len(lines) < 3:
        return False
    widths = sorted(len(line.strip()) + len(_WIDE.findall(line)) for line in lines)
    marked = sum(_LISTED.search(line) is not None or _ENDED.search(line) is None for line in lines)
    return widths[len(widths) // 2] <= _LONGEST_MEDIAN and marked >= _LINES_SHARE * len(lines)
