"""Personal data with valid check digits is masked, and text that only looks like it stays."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.privacy import KINDS, PrivacyConfig, check_luhn, check_resident_id, mask_personal

ALL = PrivacyConfig(ip_address=True)
DIGITS = st.text("0123456789", min_size=1)


def mask(text: str, language: str = "zh", config: PrivacyConfig = ALL) -> str:
    return mask_personal([text], [language], config).texts[0]


@st.composite
def resident_ids(draw) -> str:
    born = draw(st.dates(datetime.date(1920, 1, 1), datetime.date(2026, 1, 1)))
    body = f"{draw(st.integers(110000, 659999))}{born:%Y%m%d}{draw(st.integers(0, 999)):03}"
    # The table of GB 11643, written out.
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(c) * w for c, w in zip(body, weights, strict=True))
    return body + "10X98765432"[total % 11]


@st.composite
def cards(draw) -> str:
    prefix, size = draw(st.sampled_from([("4", 16), ("51", 16), ("2221", 16), ("62", 16), ("62", 19), ("37", 15)]))
    body = prefix + "".join(draw(st.lists(st.sampled_from("0123456789"), min_size=20, max_size=20)))
    body = body[: size - 1]
    total = sum(sum(map(int, str(2 * int(c)))) if i % 2 == 0 else int(c) for i, c in enumerate(reversed(body)))
    return body + str(-total % 10)


MOBILES = st.from_regex(r"1[3-9][0-9]{9}", fullmatch=True)
LANDLINES = st.from_regex(r"0(10|2[13579]|3[1-9][0-9]|5[1-9][0-9])-[2-8][0-9]{6,7}", fullmatch=True)
FOREIGN = st.sampled_from(
    ["+1 (415) 555-2671", "+44 865 511245", "+8613800138000", "+49 89 3207395", "+1-202-555-0143"]
)
EMAILS = st.from_regex(
    r"[a-z0-9]{1,6}([._%+-][a-z0-9]{1,5})?@([a-z0-9-]{0,4}[a-z0-9]\.){1,2}(com|cn|org)", fullmatch=True
)
ADDRESSES = st.sampled_from(
    ["130.89.148.77", "8.8.8.200", "2001:67c:2564:a119::77", "2a01:238:43ed:c300:10c3:bcf3:3266:da74"]
)
PERSONAL = st.one_of(
    st.tuples(st.just("email"), EMAILS), st.tuples(st.just("id_number"), resident_ids()),
    st.tuples(st.just("card_number"), cards()), st.tuples(st.just("phone"), MOBILES | LANDLINES | FOREIGN),
    st.tuples(st.just("ip_address"), ADDRESSES),
)  # fmt: skip
AROUND = st.sampled_from(
    [("", ""), ("请联系 ", "。"), ("电话：", "，谢谢"), ("(", ")"), ("<", ">, "), ('"', '"\n'), ("号码是", "或")]
)


@given(st.lists(st.tuples(PERSONAL, AROUND), min_size=1, max_size=4))
def test_personal_data_is_masked_and_counted(parts):
    text = expected = ""
    counts = dict.fromkeys(KINDS, 0)
    for (kind, value), (before, after) in parts:
        text += f"{before}{value}{after}\n"
        expected += f"{before}<{kind}>{after}\n"
        counts[kind] += 1
    result = mask_personal(["nothing", text], ["en", "zh"], ALL)
    assert result.texts == ["nothing", expected]
    np.testing.assert_array_equal(result.counts, [[0] * 5, [counts[kind] for kind in KINDS]])


@given(PERSONAL, st.sampled_from(["a{}", "{}b", "x_{}", "{}_1", "9{}", "{}0", "1.{}", "{}.5", "deadbeef{}cafe"]))
def test_what_touches_letters_or_digits_is_part_of_something_else(personal, around):
    kind, value = personal
    if kind != "email" and value[0].isdigit():
        text = around.format(value)
        assert f"<{kind}>" not in mask(text)


@pytest.mark.parametrize(
    "text",
    [
        "@property", "a @ b", "user@localhost", "pkg@1.2.3", "13800138000*t", "3.13812345678", "v1.2.3.4",
        "127.0.0.1 and 192.168.1.77", "14.5.4.2. 写一个文件", "std::vector", "dead::beef", "12:34:56", "1700000000000",
        "1234 4111 1111 1111 1111", "4111 1111 1111 1111 1234 5678", "2024-11-24 12:22:10",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "1111111111111111",
        "11010519491231002", "ISBN 978-7-302-12345-6", "0x13812345678", "sum = a+12345678", "4111111111111111*x**2",
        "https://example.org/item/13812345678", "2023年12月31日 10:00", "123456789012345678901234567890",
    ],
)  # fmt: skip
def test_code_versions_hashes_and_numbers_stay(text):
    assert mask(text) == text


@given(resident_ids(), st.integers(0, 16), st.integers(1, 9))
def test_one_wrong_digit_makes_no_resident_id(number, place, step):
    assert check_resident_id(number)
    wrong = number[:place] + str((int(number[place]) + step) % 10) + number[place + 1 :]
    assert not check_resident_id(wrong)
    assert "<id_number>" not in mask(wrong)


@given(cards(), st.data())
def test_one_wrong_digit_makes_no_card(number, data):
    assert check_luhn(number)
    place = data.draw(st.integers(0, len(number) - 1))
    wrong = number[:place] + str((int(number[place]) + data.draw(st.integers(1, 9))) % 10) + number[place + 1 :]
    assert not check_luhn(wrong)
    assert "<card_number>" not in mask(wrong)


@pytest.mark.parametrize("number", ["4111 1111 1111 1111", "4111-1111-1111-1111", "6222 0212 3456 7890 128"])
def test_cards_in_groups_are_masked(number):
    assert mask(f"卡号 {number}。") == "卡号 <card_number>。"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("+86 138-1234-5678", "<phone>"),
        ("手机13812345678转", "手机<phone>转"),
        ("138 1234 5678", "<phone>"),
        ("(010) 62345678-801", "<phone>"),
        ("（021）58888888", "<phone>"),
        ("Tel: +44 865 511245  Fax: +1 708 971 2706\n", "Tel: <phone>  Fax: <phone>\n"),
        ("a.b@x.com, <foo@bar.co.uk>.", "<email>, <<email>>."),
        ("邮箱me@qq.com。", "邮箱<email>。"),
    ],
)
def test_ways_of_writing(text, masked):
    assert mask(text) == masked


def test_kinds_can_be_switched_off_and_numbers_stay_in_code():
    text = "a@b.com 13812345678 11010519491231002X 4111111111111111 130.89.148.77"
    assert mask(text, config=PrivacyConfig()) == "<email> <phone> <id_number> <card_number> 130.89.148.77"
    for kind in KINDS:
        result = mask(text, config=PrivacyConfig(**{**dict.fromkeys(KINDS, False), kind: True}))
        assert result.count("<") == 1 and f"<{kind}>" in result
    assert mask(text, "code") == "<email> 13812345678 11010519491231002X 4111111111111111 <ip_address>"
    assert mask(text, config=PrivacyConfig(**dict.fromkeys(KINDS, False))) == text


def test_no_documents():
    result = mask_personal([], [], ALL)
    assert result.texts == [] and result.counts.shape == (0, 5)
