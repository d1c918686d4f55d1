"""Byte streams of input files: zstd and gzip decompression, and cutting into lines, both in bounded memory."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# One byte may expand to 1,032 in gzip and to 32,768 in zstd, so little is decompressed at a time.
_GZIP_PIECE, _ZSTD_PIECE = 1 << 12, 1 << 10
_EXCERPT_BYTES = 256


class Decompressed(io.RawIOBase):
    """A zstd or gzip file as a readable stream; consecutive frames or members are joined.

    Zeros after a gzip member are padding. Damaged or truncated data raises OSError after everything intact was read.
    `stream` stays open. Raises ValueError, naming the extra, if zstandard is missing.
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
    """All members (gzip) or frames (zstd) of `stream`, read `piece` bytes at a time.

    `begin` makes the decompressor of the next one, which raises `failure`; `padding` may stand between them.
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
    """The output of a member up to the byte at which it fails."""
    parts = []
    with contextlib.suppress(failure):
        for place in range(len(data)):
            parts.append(member.decompress(data[place : place + 1]))
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------------------------- lines


class Block(NamedTuple):
    """Whole lines."""

    start: int
    """Byte where they begin, decompressed."""
    data: bytes
    """Without the last newline."""


class LongLine(NamedTuple):
    """A line over the limit, skipped without holding it in memory."""

    start: int
    length: int
    beginning: bytes


class Broken(NamedTuple):
    """The stream cannot be read beyond this byte."""

    position: int
    reason: str
    unfinished: bytes
    """Beginning of the line that was cut off."""


def line_blocks(
    read: Callable[[int], bytes], start: int, stop: int | None, limit: int, piece: int
) -> Iterator[Block | LongLine | Broken]:
    """The lines that begin in bytes start .. stop - 1 (to the end if `stop` is None), read `piece` bytes at a time.

    With start > 0 the stream must stand at start - 1, which tells a line that begins exactly at `start` from one that
    begins before. Lines over `limit` bytes become LongLine unless they arrive in one piece with others.
    """
    first = start > 0
    for event in _blocks(read, start - 1 if first else 0, start, stop, limit, piece):
        if isinstance(event, Broken):
            yield event
            return
        if first:
            # The first line began before start.
            first = False
            if isinstance(event, LongLine):
                continue
            end = event.data.find(b"\n")
            if end < 0:
                continue
            event = Block(event.start + end + 1, event.data[end + 1 :])
        if stop is None:
            yield event
            continue
        if event.start >= stop:
            return
        if isinstance(event, Block):
            # A line that begins at stop or later follows a newline at stop - 1 or later.
            end = event.data.find(b"\n", max(0, stop - 1 - event.start))
            if end >= 0:
                yield Block(event.start, event.data[:end])
                return
        yield event


def _blocks(
    read: Callable[[int], bytes], position: int, start: int, stop: int | None, limit: int, piece: int
) -> Iterator[Block | LongLine | Broken]:
    """All lines from `position` on."""
    parts: list[bytes] = []
    size = 0
    long_line: tuple[int, bytes] | None = None
    while True:
        try:
            data = read(piece)
        except OSError as error:
            yield Broken(position, str(error), long_line[1] if long_line else b"".join(parts)[:_EXCERPT_BYTES])
            return
        if not data:
            break
        if long_line:
            if stop is not None and long_line[0] < start and position >= stop:
                # One line covers the whole range: it belongs to the range in which it begins.
                return
            end = data.find(b"\n")
            if end < 0:
                position += len(data)
                continue
            yield LongLine(long_line[0], position + end - long_line[0], long_line[1])
            long_line = None
            position += end + 1
            data = data[end + 1 :]
        end = data.rfind(b"\n")
        if end >= 0:
            yield Block(position - size, b"".join([*parts, data[:end]]))
            parts, size = [], 0
            position += end + 1
            data = data[end + 1 :]
        if data:
            parts.append(data)
            size += len(data)
            position += len(data)
        if size > limit:
            long_line = position - size, b"".join(parts)[:_EXCERPT_BYTES]
            parts, size = [], 0
    if long_line:
        yield LongLine(long_line[0], position - long_line[0], long_line[1])
    elif size:
        yield Block(position - size, b"".join(parts))
