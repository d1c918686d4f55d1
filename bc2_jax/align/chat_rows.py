"""Conversations as samples of packed rows: their tokens with flags (`data.row_file`), and which share a row."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from bc2_jax.align.chat import IGNORED, Message, encode_conversation, fit_conversation
from bc2_jax.data.packing import hash_text
from bc2_jax.data.row_file import START, TARGET
from bc2_jax.tokenizer import Tokenizer

Truncation = Literal["rounds", "right", "drop"]
"""Of a conversation that is too long: its oldest rounds go, and of a last round that alone is too long its end; its end
goes; or all of it."""
TOO_LONG, NO_TARGET = "longer than max_length", "no target within max_length"
"""Reasons why nothing is left of a sample."""


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Places of `lengths` in bins of at most `capacity` in all: best-fit decreasing, the same for the same lengths.

    The longest goes first, each into the fullest bin that has room for it. Bins are in the order of their first places,
    places in a bin too. Raises ValueError for a length that is not in 1..capacity.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= capacity:
        wrong = sizes.min() if sizes.min() < 1 else sizes.max()
        raise ValueError(f"lengths has {wrong}, which is not valid: each must be in 1..{capacity}.")
    bins: list[list[int]] = []
    rooms: list[int] = []
    """Different rooms of bins that are not full, ascending; and the bins with each room."""
    bins_with: dict[int, list[int]] = {}
    for place in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[place])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            number = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[at], bins_with[room]
        bins[number].append(place)
        if left := room - size:
            if left not in bins_with:
                bisect.insort(rooms, left)
                bins_with[left] = []
            bins_with[left].append(number)
    return sorted(sorted(places) for places in bins)


class Texts:
    """The encoder of `align.chat` for texts whose ids are known."""

    user_id, assistant_id, eos_id = Tokenizer.user_id, Tokenizer.assistant_id, Tokenizer.eos_id

    def __init__(self, tokenizer: Tokenizer, conversations: Iterable[Sequence[Message]]) -> None:
        texts = list(dict.fromkeys(message["content"] for messages in conversations for message in messages))
        self.encode = dict(zip(texts, tokenizer.encode_batch(texts, num_threads=1), strict=True)).__getitem__


class EncodedSamples(NamedTuple):
    """Samples as the tokens of rows; arrays have an entry for each, int64 [N]."""

    tokens: np.ndarray
    """uint32 [sum of lengths], with flags."""
    lengths: np.ndarray
    """0 where nothing is left."""
    reasons: list[str]
    """Why nothing is left; empty where something is."""
    dropped_rounds: np.ndarray
    cut_tokens: np.ndarray
    characters: np.ndarray
    bytes: np.ndarray
    """UTF-8 bytes of the whole text."""
    hashes: np.ndarray
    """uint64 [N], by which samples are held out."""


def encode_samples(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], max_length: int, truncation: Truncation = "rounds"
) -> EncodedSamples:
    """Encodes checked conversations as `encode_conversation` does, cut to `max_length`.

    Raises ValueError if the tokenizer can't spell a text without the id of padding, or its text makes a role.
    """
    texts = Texts(tokenizer, conversations)
    ids: list[int] = []
    targets: list[int] = []
    reasons: list[str] = []
    counts: list[tuple[int, ...]] = []
    """The fields of each from lengths to bytes."""
    for messages in conversations:
        if truncation == "rounds":
            found = fit_conversation(texts, messages, max_length)
            here, labels, dropped, cut = found
        else:
            here, labels = encode_conversation(texts, messages)
            dropped, cut = 0, max(0, len(here) - max_length)
        if not dropped and not cut:
            check_roles(here, messages, tokenizer)
        keep = 0 if truncation == "drop" and cut else max_length
        here, labels = here[:keep], labels[:keep]
        reason = "" if here else TOO_LONG
        # The last target is of a token that was cut off.
        if here and not any(label != IGNORED for label in labels[:-1]):
            here, labels, reason = [], [], NO_TARGET
        reasons.append(reason)
        ids += here
        targets += labels
        text = "".join(message["content"] for message in messages)
        counts.append((len(here), dropped, cut, len(text), len(text.encode())))
    lengths, dropped_rounds, cut_tokens, characters, octets = np.array(counts, np.int64).reshape(-1, 5).T
    hashes = np.array([hash_question(messages) for messages in conversations], np.uint64)
    tokens = _mark(ids, targets, lengths, tokenizer)
    return EncodedSamples(tokens, lengths, reasons, dropped_rounds, cut_tokens, characters, octets, hashes)


def _mark(ids: list[int], targets: list[int], lengths: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    tokens = as_tokens(ids, tokenizer)
    learned = np.flatnonzero(np.fromiter(targets, np.int32, len(targets)) != IGNORED)
    starts = np.cumsum(lengths) - lengths
    is_end = np.zeros(len(tokens) + 1, bool)
    is_end[np.cumsum(lengths)] = True
    learned = learned[~is_end[learned + 1]]  # what follows a sample is not its target
    tokens[learned + 1] |= TARGET
    tokens[starts[lengths > 0]] |= START
    return tokens


def as_tokens(ids: list[int], tokenizer: Tokenizer) -> np.ndarray:
    """uint32 [N]. Raises ValueError if one is the id of padding."""
    tokens = np.fromiter(ids, "<u4", len(ids))
    if not tokens.all():  # pad is 0
        raise ValueError(
            f"tokenizer = {str(tokenizer.path)!r} can't spell all of the text: packing needs byte fallback, because id "
            f"{tokenizer.pad_id} marks padding."
        )
    return tokens


def check_roles(ids: list[int], messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """Raises ValueError unless each turn has its role in `ids`, and no text has one."""
    for role, token in (("user", tokenizer.user_id), ("assistant", tokenizer.assistant_id)):
        turns = sum(message["role"] == role for message in messages)
        if ids.count(token) != turns:
            raise ValueError(
                f"tokenizer = {str(tokenizer.path)!r} is not valid: {turns} {role} messages have {ids.count(token)} "
                f"tokens {token}, so that text makes a role."
            )


def hash_question(messages: Sequence[Message]) -> int:
    """64 bits of what stands before the first answer, by which samples are held out."""
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    first = next(answers, 0)
    question = messages[:first] or messages  # that begins with an answer
    return hash_text(json.dumps([[message["role"], message["content"]] for message in question]))
