from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.cuts import SentenceConfig, low_quality_spans
from bc2_jax.curate.spans import cut_spans

CONFIG = SentenceConfig()
GOOD = "这是一个正常的句子，它有意义，也不太短，因此应当保留下来，不会被任何规则删除。"
ENGLISH = "An ordinary sentence of some length stays where it is, whatever stands around it. "
GARBAGE = {
    "max_symbol_share": "@#$%^&*<>{}[]|" * 4 + "x",
    "max_digit_share": "a1234567890 " * 6,
    "min_letter_share": "12, 34; 56, 78; " * 6,
    "max_lost_share": "some words and \ufffd\ufffd\ufffd that were lost in decoding, and more",
    "max_repeated_share": "so good " + "哈" * 60,
    "max_urls": "http://a.example/x " * 6,
}


def cut(text: str, config: SentenceConfig = CONFIG, language: str = "zh") -> str:
    spans = low_quality_spans([text], [language], config)[0]
    return cut_spans(text, [start for start, _ in spans], [stop for _, stop in spans])


@pytest.mark.parametrize("field", GARBAGE)
def test_each_rule_cuts_its_garbage_and_nothing_else(field):
    off = {name: None for name in GARBAGE if name != field}
    only = dataclasses.replace(CONFIG, **off)
    bad = GARBAGE[field] + "\n"
    for config in (CONFIG, only):
        assert cut(GOOD + bad + GOOD, config) == GOOD + GOOD
        assert cut(ENGLISH + "\n" + bad + ENGLISH, config) == ENGLISH + "\n" + ENGLISH
        assert cut(bad, config, "code") == bad
    if field in ("max_lost_share", "max_repeated_share", "max_urls"):
        none = dataclasses.replace(only, **{field: None})
        assert cut(bad, none) == bad


@pytest.mark.parametrize(
    "text",
    [
        "Title\n" + "=" * 70 + "\nText.\n",
        "Chapter one " + "." * 60 + " 17\n",
        "|----------|-----------|-----------------|---------|---------|\n",
        "ffffffff80000000 | ffffffffffffffff | 00000000 | kernel text mapping\n",
        "1949年10月1日，电话号码是12345678，共计1234567890元，占98.7%，增长12.3个百分点。\n",
        "short: 12345 67890\n",
    ],
)
def test_layout_numbers_in_text_and_short_lines_stay(text):
    assert cut(text) == text


@given(st.lists(st.sampled_from([GOOD, GOOD + "\n", *[g + "\n" for g in GARBAGE.values()]]), max_size=8))
def test_spans_are_in_order_apart_and_each_document_is_judged_alone(parts):
    text = "".join(parts)
    spans = low_quality_spans(["x", text, text], ["zh"] * 3, CONFIG)
    assert spans[0] == [] and spans[1] == spans[2] == low_quality_spans([text], ["zh"], CONFIG)[0]
    places = [place for span in spans[1] for place in span]
    assert places == sorted(set(places))
    good = "".join(part for part in parts if part.startswith(GOOD))
    assert cut(text) == (good if 4 * len(good) >= len(text) else text)


@pytest.mark.parametrize(
    "text",
    [
        "Year Births Deaths\n" + "".join(f"19{i} {i * 791 % 997:,} 988,431 41,220,118 77,004,912\n" for i in range(9)),
        "口算练习\n" + "25×4=100  125×8=1000  36÷9=4  17+5=22  102-77=25  12×12=144\n" * 3 + "3x-7=2x+5，x=12\n",
    ],
)  # fmt: skip
def test_tables_and_mathematics_stay(text):
    assert cut(text) == cut(text, language="en") == text


def test_bad_fields_are_named():
    for field, value in (("max_symbol_share", 1.5), ("min_characters", 0), ("max_urls", 0)):
        with pytest.raises(ValueError, match=f"sentences.{field} = .* is not valid: "):
            SentenceConfig(**{field: value})
