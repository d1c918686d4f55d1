"""Text encodings other than UTF-8: checking their names, transcoding streams, guessing the encoding of bytes."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from bc2_jax.validation import require

BYTE_ORDER_MARK = "\ufeff"
_PIECE = 64 << 10
# Of a text taken for GB18030, this share of its characters beyond ASCII must be common ones.
_COMMON = 0.9
_LOOKED_AT = 512
_LEAST_COMMON = 4


def check_encoding(field: str, encoding: str) -> None:
    """Raises ValueError, naming the field, for a name that is not a text encoding."""
    legal = "it must name an encoding of text that Python knows, such as utf-8, gb18030, big5, utf-16 or latin-1"
    try:
        known = codecs.lookup(encoding)
    except (LookupError, ValueError):
        known = None
    # Some codecs are not of text, and some encode ASCII, such as line ends, as other bytes.
    ok = known is not None and getattr(known, "_is_text_encoding", True)
    if ok:
        try:
            ok = is_wide(encoding) or ("{\n".encode(encoding), b"{\n".decode(encoding)) == (b"{\n", "{\n")
        except ValueError:
            ok = False
    require(ok, field, encoding, legal)


def is_wide(encoding: str) -> bool:
    """Whether characters have two or four bytes, so that a byte b"\\n" need not end a line."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def transcoded(read: Callable[[int], bytes], encoding: str) -> Callable[[int], bytes]:
    """`read` transcoded to UTF-8: a function that gives about n bytes, b"" at the end.

    Half a surrogate pair becomes bytes that are not UTF-8, so that its line is reported. Raises OSError where the rest
    cannot be decoded.
    """
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    done = False

    def read_utf8(size: int) -> bytes:
        nonlocal done
        while not done:
            data = read(min(size, _PIECE))
            done = not data
            try:
                text = decoder.decode(data, done)
            except UnicodeDecodeError as error:
                raise OSError(f"it is not {encoding.upper()} ({error.reason})") from error
            if text:
                return text.encode("utf-8", "surrogatepass")
        return b""

    return read_utf8


def hint(data: bytes) -> str:
    """A hint at the encoding of bytes that are not UTF-8, in parentheses; "" if there is none."""
    encoding = _guess(data[:_LOOKED_AT])
    return f" (it looks like {encoding.upper()}: --encoding {encoding} of tools/curate.py reads it)" if encoding else ""


def _guess(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(data) > 3:
        return "utf-16"
    zeros = data[::2].count(0), data[1::2].count(0)
    if max(zeros) > len(data) // 4 > 0:
        # A line is cut after the newline's first byte, so little-endian text may begin with a second byte.
        return "utf-16"
    # The last character may be cut.
    text = next((text for end in range(4) if (text := _decode(data[: len(data) - end]))), "")
    beyond = [c for c in text if c > "\x7f"]
    common = sum(
        "\u4e00" <= c <= "\u9fff" and _is_common(c) or c in "，。、；：？！“”‘’（）《》【】…—　·" for c in beyond
    )
    return "gb18030" if common >= max(_LEAST_COMMON, _COMMON * len(beyond)) else ""


def _decode(data: bytes) -> str:
    try:
        return data.decode("gb18030")
    except UnicodeDecodeError:
        return ""


def _is_common(character: str) -> bool:
    """Whether it is one of the 3,755 common characters of GB 2312's first level."""
    try:
        return character.encode("gb2312")[0] <= 0xD7
    except UnicodeEncodeError:
        return False
