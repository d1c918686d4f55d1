"""Ends of paragraphs and sentences, and the text left after cuts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.spans import PARAGRAPH, SENTENCE, cut_spans, find_spans

TEXTS = st.lists(st.text(st.sampled_from('ab好。.!？ \n”")'), max_size=60), max_size=6)


def listed(texts, kind, shortest=1):
    spans = find_spans(texts, shortest, shortest)
    rows = zip(spans.document, spans.start, spans.stop, spans.kind, strict=True)
    return [texts[d][a:b] for d, a, b, k in rows if k == kind]


def test_paragraphs():
    wrapped = "This is a line of text that was wrapped in the middle. It\ngoes on until here."
    assert listed([f"A heading\n{wrapped}\nAnother one\n\n"], PARAGRAPH) == ["A heading", wrapped, "Another one"]
    chinese = ["第一段。", "第二段", "第三段很长很长很长很长很长很长很长很长很长很长很长\n还是第三段，"]
    assert listed(["\n".join(chinese) + "\n\n\n第四段"], PARAGRAPH) == [*chinese, "第四段"]


def test_sentences():
    text = '他说：“你好。”然后走了！真的吗？！\nPi is 3.14. Go to a.b.c now. "Stop." (Yes.) Fine'
    assert listed([text], SENTENCE) == [
        "他说：“你好。”", "然后走了！", "真的吗？！", "Pi is 3.14.", "Go to a.b.c now.", '"Stop."', "(Yes.)", "Fine",
    ]  # fmt: skip


def test_a_sentence_that_is_a_paragraph_is_listed_once():
    assert listed(["One sentence.\n"], SENTENCE) == [] and listed(["One sentence.\n"], PARAGRAPH) == ["One sentence."]


@given(TEXTS)
def test_spans_cover_all_but_blanks_and_hash_by_content(texts):
    spans = find_spans(texts, 1, 1)
    names: dict[int, str] = {}
    covered = [np.zeros(len(text), bool) for text in texts]
    for document, start, stop, value, kind in zip(*(column.tolist() for column in spans), strict=True):
        content = texts[document][start:stop]
        assert content and content == content.strip(" \n")
        assert names.setdefault(value, content) == content
        if kind == PARAGRAPH:
            assert not covered[document][start:stop].any()
            covered[document][start:stop] = True
    assert len(set(names.values())) == len(names)
    for text, seen in zip(texts, covered, strict=True):
        assert not "".join(c for c, s in zip(text, seen, strict=True) if not s).strip(" \n")
    assert (np.diff(spans.document) >= 0).all()


def test_none_are_listed():
    texts = ["One sentence. Another one. " * 5]
    assert set(find_spans(texts, 0, 5).kind.tolist()) == {SENTENCE}
    assert set(find_spans(texts, 5, 0).kind.tolist()) == {PARAGRAPH}


@given(TEXTS, st.integers(1, 20))
def test_short_spans_are_left_out(texts, shortest):
    every, some = find_spans(texts, 1, 1), find_spans(texts, shortest, shortest)
    long_enough = every.stop - every.start >= shortest
    # A sentence that is a whole paragraph is the paragraph.
    assert np.array_equal(some.hash, every.hash[long_enough])


@pytest.mark.parametrize(
    "text, cut, left",
    [
        ("One here. Two here. Three.", "Two here.", "One here. Three."),
        ("甲句。乙句。丙句。", "乙句。", "甲句。丙句。"),
        ("First.\n\nSecond.\n\nThird.", "Second.", "First.\n\nThird."),
        ("First.\nSecond.\nThird.", "Second.", "First.\nThird."),
        ("First.\nSecond.", "First.", "Second."),
        ("First. Second.", "First.", "Second."),
        ("First.\n  Second line\n  third", "First.", "  Second line\n  third"),
        ("All of it", "All of it", ""),
        ("Head. Tail\n\nNext", "Tail", "Head.\n\nNext"),
    ],
)
def test_cutting_leaves_no_holes(text, cut, left):
    start = text.index(cut)
    assert cut_spans(text, [start], [start + len(cut)]) == left


def test_overlapping_cuts():
    assert cut_spans("aaa bbb ccc ddd", [0, 0, 8], [7, 3, 11]) == "ddd"


@given(st.text(st.sampled_from("ab. \n"), max_size=40), st.data())
def test_nothing_else_is_lost(text, data):
    edges = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    edges = edges[: len(edges) // 2 * 2]
    starts, stops = edges[::2], edges[1::2]
    kept = "".join(text[a:b] for a, b in zip([0, *stops], [*starts, len(text)], strict=True))
    assert "".join(cut_spans(text, starts, stops).split()) == "".join(kept.split())
