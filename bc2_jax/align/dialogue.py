"""A conversation of several turns with whatever answers: a model of this process (`conversation.py`), or a server
(`server_chat.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bc2_jax.align.chat import Message

OnText = Callable[[str], object]
"""Called with text that follows on what it was given before; never with none."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered, and what it did not see."""

    text: str
    reason: str
    """Why it ended: at an "eos", at the "length" of max_new_tokens, "stopped" by a stop text, or "interrupted"."""
    dropped_rounds: int
    """Oldest rounds of the conversation that had no room."""
    cut_tokens: int
    """Tokens of the system text, then of the newest round, that had no room."""


Answers = Callable[[Sequence[Message], OnText, Mapping[str, Any]], Answer]
"""Answers the last of some messages, giving text as it is written, with the settings that are not to be its own."""


class Dialogue:
    """Messages, and what answers them. `settings` are for every answer; all others are those of `answers`.

    The history that has no room is left out of the prompt, not of `messages`. `check` raises ValueError for settings
    that are not legal as soon as one is changed; without it what answers has to.
    """

    def __init__(
        self, answers: Answers, system: str = "", *, check: Callable[[Mapping[str, Any]], object] | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        self._answers, self._check = answers, check
        self.settings = settings
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._tries = 0
        """How often the newest answer was regenerated."""

    @property
    def system(self) -> str:
        """The system text; empty for none. Another one holds from the next answer on."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = self.messages[1:] if self.system else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def change(self, settings: Mapping[str, Any]) -> None:
        """Other settings from the next answer on. Raises ValueError as `check`, and leaves them as they were then."""
        if self._check is not None:
            self._check(settings)
        self.settings = dict(settings)

    def clear(self) -> None:
        """Forgets all but the system text."""
        self.messages = self.messages[:1] if self.system else []

    def ask(self, text: str, on_text: OnText | None = None) -> Answer:
        """The answer to the next user message; both are then among the messages.

        KeyboardInterrupt stops the answer: the text so far is kept as the answer, or the user message is discarded if
        there is none. Any other exception leaves the conversation unchanged. Raises as what answers does.
        """
        return self._ask([*self.messages, {"role": "user", "content": text}], 0, on_text)

    def regenerate(self, on_text: OnText | None = None) -> Answer:
        """Another answer in the place of the newest, drawn with the next seed if the settings have one.

        As `ask`; the newest answer stays if there is no other. Raises ValueError if there is none yet.
        """
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
"""Settings that are a number: those that a person can set in a conversation."""


def read_setting(name: str, text: str) -> int | float:
    """The value of one of NUMBERS; raises ValueError for what is not such a number."""
    kind = NUMBERS[name]
    try:
        return kind(text)
    except ValueError as error:
        legal = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} = {text!r} is not valid: it must be {legal}.") from error
