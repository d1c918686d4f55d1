"""Preference pairs as samples of packed rows: the prompt once, as the trunk, and both answers as its branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bc2_jax.align.chat import IGNORED, EncodedPair, Message, encode_pair
from bc2_jax.align.chat_rows import (
    NO_TARGET,
    TOO_LONG,
    EncodedSamples,
    Texts,
    Truncation,
    as_tokens,
    check_roles,
    hash_question,
)
from bc2_jax.align.formats import Sample
from bc2_jax.data.records import Invalid
from bc2_jax.data.row_file import BRANCH, START, TARGET
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import show

EQUAL = "chosen and rejected are the same tokens"
"""Reason why nothing is left of a pair; what told them apart may have been cut off."""
_SCORES = ("score_chosen", "score_rejected")
_LARGEST = 3.4e38
"""Of fp32, nearly."""


class Pair(NamedTuple):
    """Two answers to the same messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def as_pair(found: Sample | Invalid) -> Sample | Invalid:
    """A preference pair with its margin: the field `margin`, or else score_chosen - score_rejected.

    Returns Invalid for a sample that is not a preference pair, and if the margin or a score is not a finite number.
    """
    if isinstance(found, Invalid):
        return found
    if found.rejected is None:
        return Invalid("not a preference pair (chosen and rejected are needed)", found.where)
    record = found.fields
    for field in ("margin", *_SCORES):
        if not _is_finite(record.get(field, 0)):
            return Invalid(f"{field} is not a finite number ({show(record[field])})", found.where)
    scores = [record[field] for field in _SCORES if field in record]
    if len(scores) == 1:
        return Invalid(f"only one of {' and '.join(_SCORES)} (both or neither are needed)", found.where)
    margin = record.get("margin", scores[0] - scores[1] if scores else None)
    if not _is_finite(margin or 0):
        return Invalid(f"{' - '.join(_SCORES)} is not a finite number", found.where)
    return dataclasses.replace(found, margin=None if margin is None else float(margin))


def _is_finite(value: Any) -> bool:
    """Whether it is a number that fp32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[Pair], max_length: int, row_length: int, truncation: Truncation = "rounds"
) -> EncodedSamples:
    """Encodes checked pairs as `encode_pair` does: prompt and longer answer have up to `max_length` tokens, prompt and
    both up to `row_length`. Of a pair whose answers then are equal, or one without targets, nothing is left.

    Raises ValueError if the tokenizer can't spell a text without the id of padding, or its text makes a role.
    """
    texts = Texts(tokenizer, (messages for pair in pairs for messages in pair))
    ids: list[int] = []
    flags: list[int] = []
    reasons: list[str] = []
    counts: list[tuple[int, ...]] = []
    """The fields of each from lengths to bytes."""
    for pair in pairs:
        found = encode_pair(texts, *pair, max_length, row_length, drop_rounds=truncation == "rounds")
        if not found.dropped_rounds and not found.cut_tokens:
            for messages, answer in zip((pair.chosen, pair.rejected), found.answers, strict=True):
                check_roles(found.prompt + answer, [*pair.prompt, *messages], tokenizer)
        reason = _why_lost(found, truncation)
        if not reason:
            ids += found.prompt + found.answers[0] + found.answers[1]
            flags += _flags(found)
        reasons.append(reason)
        text = "".join(message["content"] for messages in pair for message in messages)
        length = 0 if reason else len(found.prompt) + sum(map(len, found.answers))
        counts.append((length, found.dropped_rounds, found.cut_tokens, len(text), len(text.encode())))
    lengths, dropped_rounds, cut_tokens, characters, octets = np.array(counts, np.int64).reshape(-1, 5).T
    hashes = np.array([hash_question([*pair.prompt, *pair.chosen]) for pair in pairs], np.uint64)
    tokens = as_tokens(ids, tokenizer) | np.array(flags, "<u4")
    return EncodedSamples(tokens, lengths, reasons, dropped_rounds, cut_tokens, characters, octets, hashes)


def _why_lost(found: EncodedPair, truncation: Truncation) -> str:
    if truncation == "drop" and found.cut_tokens:
        return TOO_LONG
    if any(all(label == IGNORED for label in targets) for targets in found.targets):
        return NO_TARGET
    return EQUAL if found.answers[0] == found.answers[1] else ""


def _flags(found: EncodedPair) -> list[int]:
    flags = [0] * len(found.prompt)
    for targets in found.targets:
        flags += [int(BRANCH), *(int(TARGET) if label != IGNORED else 0 for label in targets[1:])]
    flags[0] |= int(START)
    return flags
