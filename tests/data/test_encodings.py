"""Text that is not UTF-8."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.data.encodings import check_encoding, hint, is_utf8, is_wide, transcoded

CHINESE = '{"text": "今天的天气很好，我们去公园散步，然后回家吃饭。"}\n'


def drain(read, size: int) -> bytes:
    return b"".join(iter(lambda: read(size), b""))


@given(st.text(), st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]), st.integers(1, 50))
def test_transcoded_text_is_the_text(text: str, encoding: str, size: int) -> None:
    stream = io.BytesIO(text.encode(encoding))
    assert drain(transcoded(stream.read, encoding), size).decode() == text


def test_what_is_no_text_is_an_error_behind_what_is() -> None:
    read = transcoded(io.BytesIO("good\n".encode("utf-16") + b"x").read, "utf-16")
    assert read(100) == b"good\n"
    with pytest.raises(OSError, match=r"it is not UTF-16 \(truncated data\)"):
        read(100)


@pytest.mark.parametrize("encoding", ["gb18030", "GBK", "utf-16", "UTF-8", "latin-1", "big5", "cp1252", "shift-jis"])
def test_encodings(encoding: str) -> None:
    check_encoding("read.encoding", encoding)
    assert is_wide(encoding) == (encoding == "utf-16") and is_utf8(encoding) == (encoding == "UTF-8")


@pytest.mark.parametrize("encoding", ["", "gb-nothing", "zlib", "rot13", "cp037", "utf-7\0"])
def test_no_encodings(encoding: str) -> None:
    with pytest.raises(ValueError, match=r"read.encoding = .* is not valid: it must name an encoding of text"):
        check_encoding("read.encoding", encoding)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (CHINESE.encode("gb18030"), "GB18030: --encoding gb18030"),
        (CHINESE.encode("gb18030")[:30], "GB18030"),
        (CHINESE.encode("gb18030")[:31], "GB18030"),
        (CHINESE.encode("utf-16"), "UTF-16: --encoding utf-16"),
        ('{"text": "plain"}'.encode("utf-16-le"), "UTF-16"),
        ('{"text": "plain"}'.encode("utf-16-be")[1:], "UTF-16"),
        (b"\xff\xfe", None),
        (b'{"text": "caf\xe9 au lait, d\xe9j\xe0 vu"}', None),
        (bytes(range(128, 256)), None),
        (CHINESE.encode()[:21] + b"\xff" + CHINESE.encode()[21:], None),
        (b"", None),
    ],
)
def test_what_bytes_look_like(data: bytes, said: str | None) -> None:
    assert (said in hint(data)) if said else hint(data) == ""
