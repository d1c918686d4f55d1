"""Text as it grows, for terminals and servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Turns tokens that arrive one by one into pieces of text that never have to be taken back.

    A character outside the vocabulary arrives as up to four byte tokens; until it is whole, `decode` (ids -> text) ends
    in U+FFFD. Such an end is held back until the next tokens settle it, or `finish`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        """The text that is new and final; empty while a character is incomplete."""
        self._ids.append(token_id)
        return self._take(self._decode(self._ids).rstrip("\ufffd"))

    def finish(self) -> str:
        """What was held back."""
        return self._take(self._decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new
