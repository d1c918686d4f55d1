"""A stream of bytes -> blocks of whole lines, in bounded memory whatever the length of a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from bc2_jax.data.decompression import Decompressed

_PIECE_BYTES = 2 << 20
# What cannot be decompressed is lost in pieces of this size.
_DECOMPRESSED_BYTES = 64 << 10
_BEGINNING_BYTES = 256


class Block(NamedTuple):
    """Whole lines."""

    start: int
    """Where they begin, in the decompressed file."""
    data: bytes
    """Without the newline of the last."""


class LongLine(NamedTuple):
    """A line that was skipped."""

    start: int
    length: int
    beginning: bytes


class Broken(NamedTuple):
    """The stream cannot be read beyond this place."""

    position: int
    reason: str
    unfinished: bytes
    """Beginning of the line that is cut off there."""


def decompressed(stream: IO[bytes] | Any, compression: str | None) -> tuple[Callable[[int], bytes], int]:
    """read(n), which gives up to n more bytes in bounded memory, and a good n. It raises OSError for a stream that is
    corrupt or ends too early, after all that is intact; frames or members that follow each other are read as one."""
    if compression is None:
        return stream.read, _PIECE_BYTES
    return Decompressed(stream, compression).read, _DECOMPRESSED_BYTES


def line_blocks(
    read: Callable[[int], bytes], start: int, stop: int | None, limit: int, piece: int
) -> Iterator[Block | LongLine | Broken]:
    """The lines that begin in start .. stop - 1 (stop None: all others), lines of more than limit bytes only named
    unless they arrive in one piece with others. With start > 0 the stream has to stand at start - 1, so that a line
    beginning exactly at start is told from one that begins before."""
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
    """All lines from position on."""
    parts: list[bytes] = []
    size = 0
    long_line: tuple[int, bytes] | None = None
    while True:
        try:
            data = read(piece)
        except OSError as error:
            yield Broken(position, str(error), long_line[1] if long_line else b"".join(parts)[:_BEGINNING_BYTES])
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
            long_line = position - size, b"".join(parts)[:_BEGINNING_BYTES]
            parts, size = [], 0
    if long_line:
        yield LongLine(long_line[0], position - long_line[0], long_line[1])
    elif size:
        yield Block(position - size, b"".join(parts))
