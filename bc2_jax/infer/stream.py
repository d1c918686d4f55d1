"""Text as it grows, for terminals and servers, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character of UTF-8 has at most 4 bytes, so bytes that are further back belong to no character to come.
_LONGEST_CHARACTER = 4
# Tokens without a whole character at their end before a border inside them is looked for.
_LONGEST_OPEN = 16


class TextStream:
    """Turns tokens that arrive one by one into pieces of text that never have to be taken back.

    A character outside the vocabulary arrives as up to four byte tokens; until it is whole, `decode` (ids -> text) ends
    in U+FFFD. Such an end is held back until the next tokens settle it, or `finish`; so is an end that may be the
    beginning of a stop string. The text ends before the first stop string that is complete in it, wherever the borders
    of tokens are; of several that end at the same character the longest counts.

    The work for a token does not grow with the text: tokens are decoded from the last border on at which a character
    was whole. That is the text of all of them, for no piece of the vocabulary but bytes depends on its neighbours.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._open: list[int] = []
        """Tokens whose text may still change."""
        self._settled = ""
        """The text before them, from the first character on that was not given."""
        self._given = 0
        """Characters of `_settled` and the text of `_open` that were given."""
        self.stopped = False
        """Whether a stop string was found: what comes after it is not text."""

    def add(self, token_id: int) -> str:
        """The text that is new and final; empty while a character or a stop string may be incomplete."""
        self._open.append(token_id)
        text = self._decode(self._open)
        whole = text.rstrip("\ufffd")
        if whole == text:
            self._settle(text, len(self._open))
            whole = ""
        elif len(self._open) >= _LONGEST_OPEN:
            whole = whole[self._cut_open(text) :]
        return self._take(self._settled + whole, is_last=False)

    def finish(self) -> str:
        """What was held back."""
        self._settle(self._decode(self._open), len(self._open))
        return self._take(self._settled, is_last=True)

    def _settle(self, text: str, count: int) -> None:
        self._settled += text
        del self._open[:count]

    def _cut_open(self, text: str) -> int:
        """Settles what is before the longest character that may be open, where that is a border of characters; returns
        how many characters that was."""
        last = len(self._open) - _LONGEST_CHARACTER
        for count in range(last, last - _LONGEST_CHARACTER, -1):
            before = self._decode(self._open[:count])
            if before + self._decode(self._open[count:]) == text:
                self._settle(before, count)
                return len(before)
        return 0

    def _take(self, text: str, is_last: bool) -> str:
        """What of `text`, that of `_settled` and of the whole characters after it, is final and was not given."""
        if self.stopped:
            return ""
        end = self._find_stop(text)
        if end is None:
            end = len(text) if is_last else len(text) - self._held_back(text)
        new = text[self._given : end]
        self._given = max(self._given, end)
        dropped = min(self._given, len(self._settled))
        self._settled = self._settled[dropped:]
        self._given -= dropped
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
