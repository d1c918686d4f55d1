"""Conversations as tokens: what a chat model is trained on, and what it is asked with.

A conversation is a list of messages, `{"role": "system" | "user" | "assistant", "content": TEXT}`. Its tokens are the
system text as it is, 195 and the text for each user message, 196 and the text for each answer; a conversation to train
on ends with eos. There is no beginning-of-text token, and eos is not an input between turns: it is only the target at
the last token of each answer. Each text is encoded alone, so that no token reaches across a border, and as plain
text, so that it can't forge a role.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from bc2_jax.validation import choices, require, show

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; other keys are not looked at."""

ROLES = ("system", "user", "assistant")
IGNORED = -100
"""The target of a token after which nothing is learned."""
_NAMES = {"system": "system text", "user": "user message", "assistant": "answer"}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Encoder(Protocol):
    """What is needed of a `Tokenizer`."""

    user_id: int
    assistant_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...


class Problem(NamedTuple):
    """Why messages are not a conversation."""

    place: int | None
    """Of the message; None if it is not about one."""
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        name = "messages" if self.place is None else f"messages[{self.place}]"
        return f"{name}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


class EncodedConversation(NamedTuple):
    """A conversation to train on, and what was lost of it."""

    ids: list[int]
    targets: list[int]
    """For each id the token that is learned to follow it, or IGNORED."""
    dropped_rounds: int
    """Oldest rounds that were left out."""
    cut_tokens: int
    """Tokens that were then cut off on the right, the final eos among them."""


class EncodedPair(NamedTuple):
    """A prompt with a chosen and a rejected answer, and what was lost of them."""

    prompt: list[int]
    """Without the role of the answers, where they begin: one token can't have two targets."""
    answers: tuple[list[int], list[int]]
    """Each from its 196 on, with all that follows, to the final eos."""
    targets: tuple[list[int], list[int]]
    """At each id of an answer the token that is learned there, after the one before it, or IGNORED."""
    dropped_rounds: int
    """Oldest rounds of the prompt that were left out."""
    cut_tokens: int
    """Tokens that were then cut off both answers on the right."""


class EncodedPrompt(NamedTuple):
    """What a model is asked with, and what was lost of the conversation."""

    ids: list[int]
    dropped_rounds: int
    """Oldest rounds that were left out."""
    cut_tokens: int
    """Tokens that were then cut off on the left: of the system text first, then of the newest round."""


def encode_conversation(
    tokenizer: Encoder, messages: Sequence[Message], max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation to train on, and for each the token that is learned to follow it, or -100.

    Learned are all tokens of every answer, the first at its 196, and eos after its last one: where the next id is the
    195 of a user message, and at the end of the conversation, where eos is an id too. With `max_length` both lists are
    cut on the right to so many tokens; all targets may then be -100, and there is nothing to learn from the sample.

    Raises ValueError as `check_messages`, and for a max_length below 1.
    """
    ids, labels = _encode_labelled(tokenizer, messages, _encode_each(tokenizer, messages))
    if max_length is not None:
        _require_length("max_length", max_length)
    ids, labels = ids[:max_length], labels[:max_length]
    return ids, [*labels[1:], IGNORED]


def fit_conversation(tokenizer: Encoder, messages: Sequence[Message], max_length: int) -> EncodedConversation:
    """`encode_conversation` of what `drop_oldest_rounds` leaves, which encodes each text only once."""
    encoded = _encode_each(tokenizer, messages)
    kept, dropped = _keep_newest(messages, encoded, _require_length("max_length", max_length) - 1)
    ids, labels = _encode_labelled(tokenizer, [messages[i] for i in kept], [encoded[i] for i in kept])
    targets = [*labels[1:max_length], IGNORED]
    return EncodedConversation(ids[:max_length], targets, dropped, max(0, len(ids) - max_length))


def encode_pair(
    tokenizer: Encoder, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message],
    max_length: int, most_tokens: int, drop_rounds: bool = True,
) -> EncodedPair:  # fmt: skip
    """Encodes a prompt with its chosen and its rejected answer.

    An answer is a list of messages that begins with the assistant's; further rounds may follow. Prompt and longer
    answer have at most `max_length` tokens, prompt and both at most `most_tokens`. To fit, the oldest
    rounds of the prompt go (`drop_rounds`), but never its last; then the ends of the answers, of the longer one first.
    Where the prompt alone is too long, nothing is left of them. Raises ValueError as `encode_conversation`.
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
    """The messages without as many of the oldest rounds as it takes to fit, and how many rounds those are.

    A round is a user message and what follows up to the next one. The system text and the last round always stay: if
    they alone have more than `max_length` tokens, the final eos included, they are still too long. Raises ValueError as
    `encode_conversation`.
    """
    encoded = _encode_each(tokenizer, messages)
    kept, dropped = _keep_newest(messages, encoded, _require_length("max_length", max_length) - 1)
    return [messages[i] for i in kept], dropped


def encode_prompt(
    tokenizer: Encoder, messages: Sequence[Message], max_new_tokens: int, model_max_length: int
) -> list[int]:
    """The token ids that ask a model for the next answer, as the released chat code makes them.

    There is room for model_max_length - max_new_tokens ids. As many of the newest rounds are kept as fit beside the
    system text, the newest always; what is then still too long is cut on the left. The ids end with 196, where the
    answer begins, unless the last message is an answer: then that one is continued.

    Raises ValueError for no messages, a system text alone or not as the first message, another role, content that is no
    text or has a lone surrogate, and for a max_new_tokens that leaves no room.
    """
    return fit_prompt(tokenizer, messages, max_new_tokens, model_max_length).ids


def fit_prompt(
    tokenizer: Encoder, messages: Sequence[Message], max_new_tokens: int, model_max_length: int
) -> EncodedPrompt:
    """`encode_prompt`, and what was lost of the conversation."""
    _require_length("model_max_length", model_max_length)
    legal = f"it must be a whole number, at least 0 and below model_max_length = {model_max_length}"
    require(
        _is_whole(max_new_tokens) and 0 <= max_new_tokens < model_max_length, "max_new_tokens", max_new_tokens, legal
    )
    _check_list(messages)
    if problem := find_problem(messages, to_train=False):
        raise ValueError(f"{problem}.")
    room = model_max_length - max_new_tokens
    encoded = _encode_each(tokenizer, messages, check=False)
    kept, dropped = _keep_newest(messages, encoded, room)
    ids = [token for i in kept for token in encoded[i]]
    if messages[-1]["role"] != "assistant":
        ids.append(tokenizer.assistant_id)
    return EncodedPrompt(ids[-room:], dropped, max(0, len(ids) - room))


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ValueError, naming the message, unless `messages` are a conversation to train on.

    It is: at most one system text, first; user messages and answers in turn, the last one an answer; each role one of
    ROLES, each content a text that is not empty (but the system's) and has no lone surrogate. An answer may be the
    first of them: a greeting.
    """
    _check_list(messages)
    if problem := find_problem(messages):
        raise ValueError(f"{problem}.")


def find_problem(messages: Sequence[Any], to_train: bool = True) -> Problem | None:
    """What `check_messages` raises for; without `to_train` only what a prompt may not have, which has no tokens."""
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


def _check_list(messages: Any) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages = {show(messages)} is not valid: it must be a list of messages.")


def _encode_each(tokenizer: Encoder, messages: Sequence[Message], check: bool = True) -> list[list[int]]:
    """The ids of each message, that of its role first."""
    if check:
        check_messages(messages)
    roles = {"system": [], "user": [tokenizer.user_id], "assistant": [tokenizer.assistant_id]}
    return [roles[message["role"]] + tokenizer.encode(message["content"]) for message in messages]


def _encode_labelled(
    tokenizer: Encoder, messages: Sequence[Message], encoded: Sequence[list[int]]
) -> tuple[list[int], list[int]]:
    """All ids with the final eos, and at each the token that is learned there as the next one of the id before it."""
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
    """The places of the system text and of the newest rounds that fit, at least one; and how many rounds do not."""
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
