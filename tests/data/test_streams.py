"""Compressed files, whole and damaged, against what was compressed."""

from __future__ import annotations

import gzip
import io
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.data.streams import Decompressed

PACK = {"gzip": gzip.compress, "zstd": zstandard.compress}


def drain(data: bytes, compression: str, size: int = 1000) -> tuple[bytes, str]:
    """What comes before an error, and the error."""
    stream, parts = Decompressed(io.BytesIO(data), compression), []
    try:
        while part := stream.read(size):
            parts.append(part)
    except OSError as error:
        return b"".join(parts), str(error)
    return b"".join(parts), ""


@given(st.lists(st.binary(max_size=3000), max_size=4), st.sampled_from(["gzip", "zstd"]), st.integers(1, 5000))
def test_frames_after_one_another(contents: list[bytes], compression: str, size: int) -> None:
    data = b"".join(map(PACK[compression], contents))
    assert drain(data, compression, size) == (b"".join(contents), "")


@given(st.binary(max_size=20_000), st.binary(max_size=3000), st.data())
def test_gzip_gives_all_that_is_intact(first: bytes, second: bytes, data: st.DataObject) -> None:
    packed = gzip.compress(first) + b"\0" * 9 + gzip.compress(second) + b"\0" * 5000
    assert drain(packed, "gzip") == (first + second, "")
    tail = gzip.compress(second)
    cut = data.draw(st.integers(1, len(tail) - 1))
    found, error = drain(gzip.compress(first) + tail[:cut], "gzip")
    assert (
        found == first + zlib.decompressobj(31).decompress(tail[:cut]) and error == "the gzip data ends in the middle"
    )
    wrong = bytearray(tail)
    wrong[-8] ^= 1  # its checksum
    found, error = drain(gzip.compress(first) + wrong, "gzip")
    assert found == first + second and error.startswith("the gzip data is damaged: ")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_garbage_and_bombs(compression: str) -> None:
    good = PACK[compression](b"good" * 1000)
    found, error = drain(good + b"garbage", compression)
    assert found == b"good" * 1000 and "data is damaged: " in error
    stream = Decompressed(io.BytesIO(PACK[compression](bytes(1 << 26))), compression)
    sizes = list(iter(lambda: len(stream.read(1 << 16)), 0))
    assert sum(sizes) == 1 << 26 and max(sizes) <= 1 << 16


def test_a_cut_zstd_frame() -> None:
    data = zstandard.compress(b"one" * 1000)
    whole = drain(data + data[:-1], "zstd")
    assert whole[0].startswith(b"one" * 1000) and whole[1] == "the Zstandard data ends in the middle"
