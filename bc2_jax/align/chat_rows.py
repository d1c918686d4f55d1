"""Conversations as samples of packed rows: tokens with flags (`data.row_file`), and which samples share a row."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from bc2_jax.align.chat import IGNORED, Message, fit_conversation
from bc2_jax.data.packing import hash_text
from bc2_jax.data.row_file import BRANCH, START, TARGET
from bc2_jax.tokenizer import Tokenizer

Truncation = Literal["rounds", "right", "drop"]
"""What to do with a conversation that is too long: drop its oldest rounds and cut a last round that is still too long
at its end; cut its end; drop it."""
TOO_LONG, NO_TARGET = "longer than max_length", "no target within max_length"
"""Reasons why nothing is left of a sample."""


def pack_best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: indices of `lengths` in bins of at most `capacity` in all; deterministic.

    The longest goes first, each into the fullest bin that has room for it. Bins are ordered by their first indices,
    indices in a bin too. Raises ValueError for a length outside 1..capacity.
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


class EncodedTexts:
    """An `align.chat.Encoder` of texts that were encoded together beforehand."""

    user_id, assistant_id, eos_id = Tokenizer.user_id, Tokenizer.assistant_id, Tokenizer.eos_id

    def __init__(self, tokenizer: Tokenizer, conversations: Iterable[Sequence[Message]]) -> None:
        texts = list(dict.fromkeys(message["content"] for messages in conversations for message in messages))
        self.encode = dict(zip(texts, tokenizer.encode_batch(texts, num_threads=1), strict=True)).__getitem__


class EncodedSample(NamedTuple):
    """A conversation or a pair as tokens of a row."""

    messages: Sequence[Message]
    """All of its messages."""
    question_hash: int
    """64 bits, by which samples are held out."""
    ids: list[int]
    labels: list[int]
    """At each id the token learned at this place, as the next one of the id before, or IGNORED."""
    reason: str
    """Why the sample is left out; empty if it is kept."""
    dropped_rounds: int
    cut_tokens: int
    branches: tuple[int, ...] = ()
    """Where the branches of a pair begin."""


class EncodedSamples(NamedTuple):
    """Samples as tokens of rows; the other arrays have an entry for each sample, int64 [N]."""

    tokens: np.ndarray
    """uint32 [sum of lengths], with flags."""
    lengths: np.ndarray
    """0 for samples that are left out."""
    reasons: list[str]
    """Why a sample is left out; empty if it is kept."""
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
    """Encodes checked conversations as `encode_conversation`, cut to `max_length`.

    Raises ValueError if a text has tokens of padding or of a role.
    """
    texts = EncodedTexts(tokenizer, conversations)
    samples = []
    for messages in conversations:
        found = fit_conversation(texts, messages, max_length, drop_rounds=truncation == "rounds")
        if not found.dropped_rounds and not found.cut_tokens:
            check_roles(found.ids, messages, tokenizer)
        labels = [IGNORED, *found.targets[:-1]]
        reason = TOO_LONG if truncation == "drop" and found.cut_tokens else ""
        if not reason and not any(label != IGNORED for label in labels):
            reason = NO_TARGET
        lost = found.dropped_rounds, found.cut_tokens
        samples.append(EncodedSample(messages, hash_question(messages), found.ids, labels, reason, *lost))
    return join_samples(tokenizer, samples)


def join_samples(tokenizer: Tokenizer, samples: Sequence[EncodedSample]) -> EncodedSamples:
    """Flags the tokens of samples. Raises ValueError if one of them is the id of padding."""
    kept = [sample for sample in samples if not sample.reason]
    ids = [token for sample in kept for token in sample.ids]
    labels = [label for sample in kept for label in sample.labels]
    tokens = np.fromiter(ids, "<u4", len(ids))
    if not tokens.all():  # pad is 0
        raise ValueError(
            f"tokenizer = {str(tokenizer.path)!r} can't spell all of the text: packing needs byte fallback, because id "
            f"{tokenizer.pad_id} marks padding."
        )
    tokens[np.fromiter(labels, np.int32, len(labels)) != IGNORED] |= TARGET
    start = 0
    for sample in kept:
        tokens[start] |= START
        for branch in sample.branches:
            tokens[start + branch] |= BRANCH
        start += len(sample.ids)
    texts = ["".join(message["content"] for message in sample.messages) for sample in samples]
    numbers = (
        [0 if sample.reason else len(sample.ids) for sample in samples],
        [sample.dropped_rounds for sample in samples],
        [sample.cut_tokens for sample in samples],
        [len(text) for text in texts],
        [len(text.encode()) for text in texts],
    )
    lengths, dropped_rounds, cut_tokens, characters, octets = (np.array(column, np.int64) for column in numbers)
    hashes = np.array([sample.question_hash for sample in samples], np.uint64)
    reasons = [sample.reason for sample in samples]
    return EncodedSamples(tokens, lengths, reasons, dropped_rounds, cut_tokens, characters, octets, hashes)


def check_roles(ids: list[int], messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """Raises ValueError unless `ids` have exactly one role token for each turn."""
    for role, token in (("user", tokenizer.user_id), ("assistant", tokenizer.assistant_id)):
        turns = sum(message["role"] == role for message in messages)
        if ids.count(token) != turns:
            raise ValueError(
                f"tokenizer = {str(tokenizer.path)!r} is not valid: {turns} {role} messages have {ids.count(token)} "
                f"tokens {token}, so that text makes a role."
            )


def hash_question(messages: Sequence[Message]) -> int:
    """64-bit hash of the messages before the first answer."""
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    first = next(answers, 0)
    question = messages[:first] or messages  # a conversation that begins with an answer
    return hash_text(json.dumps([[message["role"], message["content"]] for message in question]))
