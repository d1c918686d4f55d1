"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), read from bytes cut anywhere."""

from __future__ import annotations

MOST_BYTES = 2**24
"""Of one event."""


class EventReader:
    """Reads the data of events; comments, names and ids of events are passed over."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._is_after_return = False

    def add(self, piece: bytes) -> list[str]:
        """The data of the events that end in this piece.

        Raises ValueError for what is not UTF-8, and for an event of more than MOST_BYTES.
        """
        if self._is_after_return and piece:  # the rest of a line end that was cut in two
            piece = piece.removeprefix(b"\n")
            self._is_after_return = False
        self._is_after_return |= piece.endswith(b"\r")
        events = []
        *lines, rest = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            event = self._end_line(bytes(self._line) + line)
            self._line.clear()
            if event is not None:
                events.append(event)
        self._line += rest
        if self._size + len(self._line) > MOST_BYTES:
            raise ValueError(f"an event has more than {MOST_BYTES} bytes")
        return events

    def _end_line(self, line: bytes) -> str | None:
        """The data of an event, if the line ends one."""
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(line)
            return None
        data, self._data, self._size = self._data, [], 0
        return b"\n".join(data).decode() if data else None
