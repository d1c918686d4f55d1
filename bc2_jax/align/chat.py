"""Conversations as token ids: the only code that turns messages into training samples and prompts.

A conversation is a list of messages `{"role": "system" | "user" | "assistant", "content": TEXT}`. Its tokens are the
system text as it is, 195 and the text of each user message, 196 and the text of each answer. A training sample ends
with eos. There is no beginning-of-text token, and eos is never an input between turns: it is only the target of the
last token of each answer. Each text is encoded alone and as plain text, so no token crosses a message border and no
text can forge a role.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from bc2_jax.validation import choices, require, show

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; other keys are ignored."""

ROLES = ("system", "user", "assistant")
IGNORED = -100
"""The target of a token after which nothing is learned."""
_NAMES = {"system": "system text", "user": "user message", "assistant": "answer"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoder(Protocol):
    """The part of `Tokenizer` that is needed here."""

    user_id: int
    assistant_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...


class Problem(NamedTuple):
    """Why messages are not a valid conversation."""

    place: int | None
    """Index of the message; None if it is not about a single one."""
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        name = "messages" if self.place is None else f"messages[{self.place}]"
        return f"{name}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


class EncodedConversation(NamedTuple):
    """A training sample, and how much of the conversation was cut."""

    ids: list[int]
    targets: list[int]
    """For each id the next token to learn, or IGNORED."""
    dropped_rounds: int
    """Oldest rounds left out."""
    cut_tokens: int
    """Tokens then cut off on the right, the final eos included."""


class EncodedPair(NamedTuple):
    """A prompt with a chosen and a rejected answer, and how much of them was cut."""

    prompt: list[int]
    """Without the 196 of the answers: one token can't have two targets."""
    answers: tuple[list[int], list[int]]
    """Each from its 196 to the final eos, further rounds included."""
    targets: tuple[list[int], list[int]]
    """At each id of an answer the token learned at this place, as the next one of the id before, or IGNORED."""
    dropped_rounds: int
    """Oldest rounds of the prompt left out."""
    cut_tokens: int
    """Tokens then cut off both answers on the right."""


class EncodedPrompt(NamedTuple):
    """A prompt for generation, and how much of the conversation was cut."""

    ids: list[int]
    dropped_rounds: int
    """Oldest rounds left out."""
    cut_tokens: int
    """Tokens then cut off on the left: of the system text first, then of the newest round."""


def encode_conversation(
    tokenizer: Encoder, messages: Sequence[Message], max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a training sample, and for each id the next token to learn, or -100.

    All tokens of every answer are targets, the first one at its 196. Eos is the target of an answer's last token, where
    195 or the final eos follows. `max_length` cuts both lists on the right; all targets may then be -100.

    Raises ValueError as `check_messages`, and for a max_length below 1.
    """
    found = fit_conversation(tokenizer, messages, 2**63 if max_length is None else max_length, drop_rounds=False)
    return found.ids, found.targets


def fit_conversation(
    tokenizer: Encoder, messages: Sequence[Message], max_length: int, drop_rounds: bool = True
) -> EncodedConversation:
    """`encode_conversation` of at most `max_length` tokens: drops the oldest rounds as `drop_oldest_rounds`, if
    `drop_rounds`, then cuts on the right."""
    encoded = _encode_each(tokenizer, messages)
    kept, dropped = list(range(len(messages))), 0
    if _require_length("max_length", max_length) and drop_rounds:
        kept, dropped = _keep_newest(messages, encoded, max_length - 1)
    ids, labels = _encode_labelled(tokenizer, [messages[i] for i in kept], [encoded[i] for i in kept])
    targets = [*labels[1:max_length], IGNORED]
    return EncodedConversation(ids[:max_length], targets, dropped, max(0, len(ids) - max_length))


def encode_pair(
    tokenizer: Encoder, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message],
    max_length: int, most_tokens: int, drop_rounds: bool = True,
) -> EncodedPair:  # fmt: skip
    """Encodes a prompt with its chosen and its rejected answer, each a list of messages that begins with an answer.

    The prompt and the longer answer have at most `max_length` tokens, the prompt and both answers at most
    `most_tokens`. To fit, the oldest rounds of the prompt are dropped (`drop_rounds`), but never the last one; then the
    ends of the answers are cut, the longer answer first. If the prompt alone is too long, nothing is left of the
    answers. Raises ValueError as `encode_conversation`.
    """
    answers: list[list[int]] = []
    targets: list[list[int]] = []
    check_messages([*prompt, *chosen])
    check_messages([*prompt, *rejected])
    for answer in (chosen, rejected):
        ids, labels = _encode_labelled(tokenizer, answer, _encode_each(tokenizer, answer, check=False))
        answers.append(ids)
        targets.append(labels)
    encoded = _encode_each(tokenizer, prompt, check=False)
    longest, both, dropped = max(map(len, answers)), sum(map(len, answers)), 0
    if drop_rounds and any(message["role"] != "system" for message in prompt):
        kept, dropped = _keep_newest(prompt, encoded, min(max_length - longest, most_tokens - both))
        encoded = [encoded[i] for i in kept]
    prompt_ids = [token for ids in encoded for token in ids]
    most_both = max(0, most_tokens - len(prompt_ids))
    first, second = (max(0, min(len(ids), max_length - len(prompt_ids))) for ids in answers)
    half = most_both // 2
    first, second = min(first, max(half, most_both - second)), min(second, max(half, most_both - first))
    return EncodedPair(
        prompt_ids, (answers[0][:first], answers[1][:second]), (targets[0][:first], targets[1][:second]), dropped,
        both - first - second,
    )  # fmt: skip


def drop_oldest_rounds(tokenizer: Encoder, messages: Sequence[Message], max_length: int) -> tuple[list[Message], int]:
    """Drops the oldest rounds until the sample fits `max_length` tokens: (messages left, number of rounds dropped).

    A round is a user message with everything up to the next one. The system text and the last round always stay, even
    if they alone, with the final eos, are too long. Raises ValueError as `encode_conversation`.
    """
    encoded = _encode_each(tokenizer, messages)
    kept, dropped = _keep_newest(messages, encoded, _require_length("max_length", max_length) - 1)
    return [messages[i] for i in kept], dropped


def encode_prompt(
    tokenizer: Encoder, messages: Sequence[Message], max_new_tokens: int, model_max_length: int
) -> list[int]:
    """Token ids of a prompt for the next answer, as the released chat code builds them.

    The prompt has at most model_max_length - max_new_tokens ids: the system text and the newest rounds that fit, at
    least one, then cut on the left. It ends with 196, where the answer begins; if the last message is an answer, that
    answer is continued instead.

    Raises ValueError for no messages, a system text alone or not first, an unknown role, content that is not text or
    has a lone surrogate, and a max_new_tokens that leaves no room.
    """
    return fit_prompt(tokenizer, messages, max_new_tokens, model_max_length).ids


def fit_prompt(
    tokenizer: Encoder, messages: Sequence[Message], max_new_tokens: int, model_max_length: int
) -> EncodedPrompt:
    """`encode_prompt`, with counts of what was cut."""
    _require_length("model_max_length", model_max_length)
    legal = f"it must be a whole number, at least 0 and below model_max_length = {model_max_length}"
    is_legal = _is_whole(max_new_tokens) and 0 <= max_new_tokens < model_max_length
    require(is_legal, "max_new_tokens", max_new_tokens, legal)
    check_messages(messages, to_train=False)
    room = model_max_length - max_new_tokens
    encoded = _encode_each(tokenizer, messages, check=False)
    kept, dropped = _keep_newest(messages, encoded, room)
    ids = [token for i in kept for token in encoded[i]]
    if messages[-1]["role"] != "assistant":
        ids.append(tokenizer.assistant_id)
    return EncodedPrompt(ids[-room:], dropped, max(0, len(ids) - room))


def check_messages(messages: Sequence[Message], to_train: bool = True) -> None:
    """Raises ValueError, naming the message, unless `messages` are a valid conversation to train on.

    Valid: at most one system text, first; user messages and answers in turn, the last one an answer; every content a
    text without lone surrogates, not empty except for the system text. The first message may be an answer (a greeting).
    Without `to_train`, a prompt: turns need not alternate, texts may be empty and the last message may be the user's.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages = {show(messages)} is not valid: it must be a list of messages.")
    if problem := find_problem(messages, to_train):
        raise ValueError(f"{problem}.")


def find_problem(messages: Sequence[Any], to_train: bool = True) -> Problem | None:
    """The first reason for which `check_messages` raises, or None."""
    before = None
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return Problem(i, "no object with role and content", show(message))
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return Problem(i, "unknown role", f"{show(role)}; legal are {choices(ROLES)}")
        if not isinstance(content, str):
            return Problem(i, "content is not text", show(content))
        if found := _SURROGATE.search(content):
            return Problem(i, f"a lone surrogate in the {_NAMES[role]}", f"at character {found.start()}")
        if role == "system" and i:
            return Problem(i, "a system text that is not the first message")
        if to_train and role != "system":
            if not content:
                return Problem(i, f"the {_NAMES[role]} is empty")
            if role == before:
                return Problem(i, f"two {_NAMES[role]}s in a row", "they must take turns")
            before = role
    if all(message["role"] == "system" for message in messages):
        return Problem(None, "a system text alone" if messages else "no message")
    if before == "user":
        return Problem(len(messages) - 1, "no answer to the last user message")
    return None


def _encode_each(tokenizer: Encoder, messages: Sequence[Message], check: bool = True) -> list[list[int]]:
    """The ids of each message, its role token first."""
    if check:
        check_messages(messages)
    roles = {"system": [], "user": [tokenizer.user_id], "assistant": [tokenizer.assistant_id]}
    return [roles[message["role"]] + tokenizer.encode(message["content"]) for message in messages]


def _encode_labelled(
    tokenizer: Encoder, messages: Sequence[Message], encoded: Sequence[list[int]]
) -> tuple[list[int], list[int]]:
    """All ids with the final eos, and at each the token learned at this place, as the next one of the id before."""
    ids: list[int] = []
    labels: list[int] = []
    before = None
    for message, found in zip(messages, encoded, strict=True):
        role = message["role"]
        ids += found
        if role == "assistant":
            labels += [IGNORED, *found[1:]]
        else:
            labels += [IGNORED] * len(found)
            if before == "assistant":
                labels[-len(found)] = tokenizer.eos_id
        before = role
    return [*ids, tokenizer.eos_id], [*labels, tokenizer.eos_id]


def _keep_newest(messages: Sequence[Message], encoded: Sequence[list[int]], room: int) -> tuple[list[int], int]:
    """Indices of the system text and of the newest rounds that fit `room` tokens, at least one; rounds dropped."""
    first = 1 if messages[0]["role"] == "system" else 0
    starts = [i for i, m in enumerate(messages) if i >= first and (i == first or m["role"] == "user")]
    ends = [*starts[1:], len(messages)]
    room -= sum(map(len, encoded[:first]))
    kept = len(starts)
    while kept:
        room -= sum(len(encoded[i]) for i in range(starts[kept - 1], ends[kept - 1]))
        if room < 0 and kept < len(starts):
            break
        kept -= 1
    return [*range(first), *range(starts[kept], len(messages))], kept


def _require_length(field: str, value: int) -> int:
    require(_is_whole(value) and value >= 1, field, value, "it must be a whole number, at least 1")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
