"""Compressed files as streams, in bounded memory and with nothing intact lost."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import Any

# A byte may stand for 1,032 in gzip and for 32,768 in zstd: so little is decompressed at one time.
_GZIP_PIECE, _ZSTD_PIECE = 1 << 12, 1 << 10


class Decompressed(io.RawIOBase):
    """The content of a zstd or gzip file, of all its frames or members one after another.

    Zeros after a member of gzip are padding, as for gzip itself. Damage, and an end in the middle, raise OSError after
    everything before has been given. `stream` is open for reading and is left open. Raises ValueError, naming the
    extra, if zstandard is missing.
    """

    def __init__(self, stream: Any, compression: str) -> None:
        self._pieces = _zstd(stream) if compression == "zstd" else _gzip(stream)
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._output = memoryview(piece)
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def _gzip(stream: Any) -> Iterator[bytes]:
    member: Any = None
    rest = b""
    while True:
        data = rest or stream.read(_GZIP_PIECE)
        if not data:
            break
        rest = b""
        if member is None:
            data = data.lstrip(b"\0")
            if not data:
                continue
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        before = member.copy()
        try:
            yield member.decompress(data)
        except zlib.error as error:
            yield _until_damage(before, data)
            raise OSError(f"the gzip data is damaged: {error}") from error
        if member.eof:
            member, rest = None, member.unused_data
    if member is not None:
        yield member.flush()
        raise OSError("the gzip data ends in the middle")


def _until_damage(member: Any, data: bytes) -> bytes:
    """What a member gives of some data before the byte at which it fails."""
    parts = []
    try:
        for place in range(len(data)):
            parts.append(member.decompress(data[place : place + 1]))
    except zlib.error:
        pass
    return b"".join(parts)


def _zstd(stream: Any) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(".zst files need zstandard: pip install 'bc2_jax[data]'.") from error
    frame: Any = None
    rest = b""
    while True:
        data = rest or stream.read(_ZSTD_PIECE)
        if not data:
            break
        rest = b""
        if frame is None:
            frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            yield frame.decompress(data)
        except zstandard.ZstdError as error:
            raise OSError(f"the Zstandard data is damaged: {error}") from error
        if frame.eof:
            frame, rest = None, frame.unused_data
    if frame is not None:
        raise OSError("the Zstandard data ends in the middle")
