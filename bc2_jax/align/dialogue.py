"""A conversation of several turns with a model of this process (`conversation.py`) or a server (`server_chat.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bc2_jax.align.chat import Message

OnText = Callable[[str], object]
"""Called with each new piece of text, never with an empty one."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, and how much of the conversation had no room."""

    text: str
    reason: str
    """Why it ended: "eos", "length" (max_new_tokens), "stopped" (a stop text) or "interrupted"."""
    dropped_rounds: int
    """Oldest rounds without room."""
    cut_tokens: int
    """Tokens without room, of the system text, then of the newest round."""


Answers = Callable[[Sequence[Message], OnText, Mapping[str, Any]], Answer]
"""(messages, on_text, settings) -> the answer, streamed to on_text; missing settings have the model's defaults."""


class Dialogue:
    """The messages so far, the `settings` of every answer, and the function `answers` that generates them.

    `messages` keeps history that has no room in a prompt. `check`, if given, raises ValueError for illegal settings
    when they are changed."""

    def __init__(
        self, answers: Answers, system: str = "", *, check: Callable[[Mapping[str, Any]], object] | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        self._answers, self._check = answers, check
        self.settings = settings
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._tries = 0
        """Regenerations of the newest answer."""

    @property
    def system(self) -> str:
        """The system text, or ""; a new one applies from the next answer on."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = self.messages[1:] if self.system else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def change(self, settings: Mapping[str, Any]) -> None:
        """Sets the settings from the next answer on. Raises ValueError as `check`, without a change."""
        if self._check is not None:
            self._check(settings)
        self.settings = dict(settings)

    def clear(self) -> None:
        """Forgets everything except the system text."""
        self.messages = self.messages[:1] if self.system else []

    def ask(self, text: str, on_text: OnText | None = None) -> Answer:
        """Answers the next user message and adds both to the messages.

        KeyboardInterrupt stops the answer: the text so far is the answer; if there is none, the user message is
        discarded. Any other exception, as `answers` raises, leaves the conversation unchanged.
        """
        return self._ask([*self.messages, {"role": "user", "content": text}], 0, on_text)

    def regenerate(self, on_text: OnText | None = None) -> Answer:
        """Replaces the newest answer, with the next seed if the settings have one; otherwise as `ask`. Raises
        ValueError without an answer."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no answer to regenerate yet.")
        return self._ask(self.messages[:-1], self._tries + 1, on_text)

    def _ask(self, asked: list[Message], tries: int, on_text: OnText | None) -> Answer:
        said: list[str] = []

        def give(new: str) -> None:
            said.append(new)
            if on_text is not None:
                on_text(new)

        settings = dict(self.settings)
        if tries and "seed" in settings:
            settings["seed"] = (settings["seed"] + tries) % 2**32
        try:
            found = self._answers(asked, give, settings)
        except KeyboardInterrupt:
            found = Answer("".join(said), "interrupted", 0, 0)
        if found.text or found.reason != "interrupted":
            self.messages = [*asked, {"role": "assistant", "content": found.text}]
            self._tries = tries
        return found


NUMBERS: Mapping[str, type[int] | type[float]] = {
    "max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float,
    "presence_penalty": float, "frequency_penalty": float, "min_tokens": int, "seed": int,
}  # fmt: skip
"""Numeric settings that a user can change in a conversation."""


def read_setting(name: str, text: str) -> int | float:
    """Parses one of NUMBERS; raises ValueError for any other text."""
    kind = NUMBERS[name]
    try:
        return kind(text)
    except ValueError as error:
        legal = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} = {text!r} is not valid: it must be {legal}.") from error
