"""Text as it grows, for terminals and servers, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Turns tokens that arrive one by one into pieces of text that never have to be taken back.

    A character outside the vocabulary arrives as up to four byte tokens; until it is whole, `decode` (ids -> text) ends
    in U+FFFD. Such an end is held back until the next tokens settle it, or `finish`; so is an end that may be the
    beginning of a stop string. The text ends before the first stop string that is complete in it, wherever the borders
    of tokens are; of several that end at the same character the longest counts.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._given = 0
        self.stopped = False
        """Whether a stop string was found: what comes after it is not text."""

    def add(self, token_id: int) -> str:
        """The text that is new and final; empty while a character or a stop string may be incomplete."""
        self._ids.append(token_id)
        return self._take(self._decode(self._ids).rstrip("\ufffd"), is_last=False)

    def finish(self) -> str:
        """What was held back."""
        return self._take(self._decode(self._ids), is_last=True)

    def _take(self, text: str, is_last: bool) -> str:
        if self.stopped:
            return ""
        end = self._find_stop(text)
        if end is None:
            end = len(text) if is_last else len(text) - self._held_back(text)
        new = text[self._given : end]
        self._given = max(self._given, end)
        return new

    def _find_stop(self, text: str) -> int | None:
        """Where the text ends if a stop string is complete; what was given holds no beginning of one."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop, self._given)) >= 0]
        if not found:
            return None
        self.stopped = True
        return min(found)[1]

    def _held_back(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(text) - self._given), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0
