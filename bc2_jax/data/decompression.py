"""Compressed files as streams, in bounded memory and with nothing intact lost."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
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
    def begin() -> Any:
        return zlib.decompressobj(zlib.MAX_WBITS | 16)

    return _decompress(stream, _GZIP_PIECE, "gzip", begin, zlib.error, padding=b"\0")


def _zstd(stream: Any) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(".zst files need zstandard: pip install 'bc2_jax[data]'.") from error

    def begin() -> Any:
        return zstandard.ZstdDecompressor().decompressobj()

    return _decompress(stream, _ZSTD_PIECE, "Zstandard", begin, zstandard.ZstdError)


def _decompress(
    stream: Any, piece: int, name: str, begin: Callable[[], Any], failure: type[Exception], padding: bytes = b""
) -> Iterator[bytes]:
    """The content of all members (gzip) or frames (zstd) of `stream`, of which `piece` bytes are read at one time.

    `begin` gives what decompresses the next one, and `failure` is what that raises. `padding` may stand between them.
    """
    member: Any = None
    rest = b""
    while data := rest or stream.read(piece):
        rest = b""
        if member is None:
            data = data.lstrip(padding) if padding else data
            if not data:
                continue
            member = begin()
        before = member.copy() if hasattr(member, "copy") else None
        try:
            yield member.decompress(data)
        except failure as error:
            if before is not None:
                yield _until_damage(before, data, failure)
            raise OSError(f"the {name} data is damaged: {error}") from error
        if member.eof:
            member, rest = None, member.unused_data
    if member is not None:
        yield member.flush()
        raise OSError(f"the {name} data ends in the middle")


def _until_damage(member: Any, data: bytes, failure: type[Exception]) -> bytes:
    """What a member gives of some data before the byte at which it fails."""
    parts = []
    with contextlib.suppress(failure):
        for place in range(len(data)):
            parts.append(member.decompress(data[place : place + 1]))
    return b"".join(parts)
