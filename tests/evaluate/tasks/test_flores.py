"""Flores-101 from files in its format; sentences are made up here."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_bleu

from bc2_jax.evaluate.task import Example, Judged
from bc2_jax.evaluate.tasks import find_task
from bc2_jax.evaluate.tasks.flores import LANGUAGES, ZH_AR, ZH_EN, ZH_JA, Similarity, judge
from tests.evaluate.tasks.files import write


def released(folder: Path, dev: int = 12, devtest: int = 120, end: str = "\n", release: int = 0) -> Path:
    for split, count in (("dev", dev), ("devtest", devtest)):
        for names in LANGUAGES.values():
            lines = [f"{split} {names[0]} 第{n}句" for n in range(count)]
            write(folder / split / f"{names[release]}.{split}", "".join(line + end for line in lines))
    return folder


@pytest.mark.parametrize(
    ("place", "end", "release"), [("", "\n", 0), ("flores101_dataset", "\r\n", 0), ("flores200_dataset", "\n", 1)]
)
def test_examples(tmp_path, place, end, release):
    released(tmp_path / place, end=end, release=release)
    loaded = ZH_EN.load(tmp_path)
    first = loaded.examples[0]
    assert len(loaded.examples) == 100 and len(find_task("flores_zh_en_all").load(tmp_path).examples) == 120
    assert first.target == "devtest eng 第0句" and first.drop == "last"
    assert first.question == (
        "Translate the following Chinese (Simpl) statements to English.\ndevtest zho_simpl 第0句\n"
    )
    assert first.shots[0] == (
        "Translate the following Chinese (Simpl) statements to English.\ndev zho_simpl 第0句\ndev eng 第0句\n\n"
    )
    assert len(set(first.shots)) == 8


def test_every_language_has_its_files(tmp_path):
    released(tmp_path)
    for code, names in LANGUAGES.items():
        if code != "zh":
            task = find_task(f"flores_zh_{code}")
            assert task.load(tmp_path).examples[0].target == f"devtest {names[0]} 第0句"
            assert set(task.paper) == {"7B", "13B"}


def test_fewer_pairs_than_shots_are_said(tmp_path):
    loaded = ZH_EN.load(released(tmp_path, dev=3))
    assert len(loaded.examples[0].shots) == 3 and "fewer than 8 shots" in loaded.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev/eng.dev", None, "dev/eng.dev is missing: dev/zho_simpl.dev"),
        ("devtest/zho_simpl.devtest", None, "devtest/zho_simpl.devtest is missing"),
        ("devtest/eng.devtest", "one\ntwo\n", "devtest has 120 sentences in Chinese and 2 in English"),
        ("dev/eng.dev", "one\n\n", "eng.dev:2 is empty"),
        ("dev/eng.dev", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_files_that_are_missing_or_damaged(tmp_path, name, content, message):
    released(tmp_path)
    (tmp_path / name).unlink() if content is None else write(tmp_path / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ZH_EN.load(tmp_path)


def test_the_most_alike_sentence_comes_first():
    alike = Similarity(["今天天气很好", "火车在八点开", "今天天气不好", "abc"])
    assert alike.nearest("明天天气不好", 2) == [2, 0]
    assert alike.nearest("火车几点开", 1) == [1]
    assert alike.nearest("完", 3) == [0, 1, 2]  # like none of them: in their order


@given(st.lists(st.text(alphabet="甲乙丙丁", min_size=2, max_size=6), min_size=1, max_size=6, unique=True), st.data())
def test_a_sentence_is_the_most_alike_to_itself(sentences, data):
    place = data.draw(st.integers(0, len(sentences) - 1))
    counts = [sorted({s[i : i + n] for n in (2, 3) for i in range(len(s) - n + 1)}) for s in sentences]
    if counts.count(counts[place]) == 1:  # no other has the same n-grams
        assert Similarity(sentences).nearest(sentences[place], 1) == [place]


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" The cat.\n", "The cat."), ("\nThe cat.\n\nTranslate", "The cat."), ("", ""), ("A\u2028b", "A\u2028b")],
)
def test_the_answer_is_the_first_line(text, answer):
    example = Example(id="0", group="", question="", target="The cat.")
    assert judge(example, text) == (answer == "The cat.", answer)


def judged(pairs: list[tuple[str, str]]) -> list[Judged]:
    make = partial(Example, group="", question="")
    return [
        Judged(make(id=str(n), target=wanted), {"exact": said == wanted}, said)
        for n, (said, wanted) in enumerate(pairs)
    ]


def test_bleu_is_that_of_the_whole_text():
    pairs = [("the cat sat on the mat today", "the cat sat on a mat today"), ("no, it did not rain", "it did not rain")]
    found = ZH_EN.summarize(judged(pairs))
    wanted = corpus_bleu([said for said, _ in pairs], [[wanted for _, wanted in pairs]])
    assert list(found) == ["BLEU (13a)", "chrF"]
    assert found["BLEU (13a)"].value == pytest.approx(wanted.score) and found["BLEU (13a)"].items == 2
    assert 0 < found["BLEU (13a)"].stderr < 30 and 0 < found["chrF"].stderr < 30


def test_the_error_is_that_of_resampling():
    # chrF of one sentence is 0 or 100, so that of n is nearly their mean: a coin of standard error 50 / sqrt(n).
    n = 400
    found = ZH_AR.summarize(judged([("abcdefgh", "abcdefgh"), ("xxxxxxxx", "abcdefgh")] * (n // 2)))["chrF"]
    assert found.value == pytest.approx(50, abs=1)
    assert found.stderr == pytest.approx(50 / math.sqrt(n), rel=0.15)


def test_japanese_has_characters_too():
    pairs = [("今日は良い天気です", "今日は良い天気でした")]
    found = ZH_JA.summarize(judged(pairs))
    assert found["BLEU (13a)"].value == pytest.approx(0, abs=1)  # one word, and it is another one
    assert found["BLEU of characters"].value > 60
    assert math.isnan(found["chrF"].stderr)
    assert ZH_JA.summarize([]) == {}


def test_without_sacrebleu_nothing_is_asked(tmp_path, monkeypatch):
    released(tmp_path)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match=r"BLEU needs sacrebleu: pip install 'bc2_jax\[eval\]'"):
        ZH_EN.load(tmp_path)
