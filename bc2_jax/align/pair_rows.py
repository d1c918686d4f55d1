"""Preference pairs as samples of packed rows: the prompt once, as the trunk, and both answers as its branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from bc2_jax.align import chat_rows
from bc2_jax.align.chat import IGNORED, EncodedPair, Message, encode_pair
from bc2_jax.align.formats import Sample
from bc2_jax.data.records import Invalid
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import show

EQUAL = "chosen and rejected are the same tokens"
"""Reason why a pair is left out; the difference may have been cut off."""
SCORE_FIELDS = ("score_chosen", "score_rejected")
"""Fields of a record whose difference is the margin of a pair that has no `margin`."""
_LARGEST = 3.4e38
"""About the largest fp32."""


class Pair(NamedTuple):
    """Two answers to the same messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def split_pair(sample: Sample) -> Pair:
    """The prompt and both answers of a preference pair."""
    assert sample.rejected is not None
    return Pair(sample.messages[: sample.shared], sample.messages[sample.shared :], sample.rejected)


def as_pair(found: Sample | Invalid) -> Sample | Invalid:
    """A preference pair with its margin: the field `margin`, or else score_chosen - score_rejected.

    Returns Invalid for a sample that is not a preference pair, and for a margin or score that is not a finite number.
    """
    if isinstance(found, Invalid):
        return found
    if found.rejected is None:
        return Invalid("not a preference pair (chosen and rejected are needed)", found.where)
    record = found.fields
    for field in ("margin", *SCORE_FIELDS):
        if not _is_finite(record.get(field, 0)):
            return Invalid(f"{field} is not a finite number ({show(record[field])})", found.where)
    scores = [record[field] for field in SCORE_FIELDS if field in record]
    if len(scores) == 1:
        return Invalid(f"only one of {' and '.join(SCORE_FIELDS)} (both or neither are needed)", found.where)
    margin = record.get("margin", scores[0] - scores[1] if scores else None)
    if not _is_finite(margin or 0):
        return Invalid(f"{' - '.join(SCORE_FIELDS)} is not a finite number", found.where)
    return dataclasses.replace(found, margin=None if margin is None else float(margin))


def _is_finite(value: Any) -> bool:
    """Whether `value` is a number that is finite in fp32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    max_length: int,
    row_length: int,
    truncation: chat_rows.Truncation = "rounds",
) -> chat_rows.EncodedSamples:
    """Encodes checked pairs as `encode_pair`: prompt and longer answer up to `max_length` tokens, prompt and both up to
    `row_length`. A pair with equal answers, or with an answer without targets, is left out.

    Raises ValueError if a text has tokens of padding or of a role.
    """
    texts = chat_rows.EncodedTexts(tokenizer, (messages for pair in pairs for messages in pair))
    samples = []
    for pair in pairs:
        found = encode_pair(texts, *pair, max_length, row_length, drop_rounds=truncation == "rounds")
        if not found.dropped_rounds and not found.cut_tokens:
            for messages, answer in zip((pair.chosen, pair.rejected), found.answers, strict=True):
                chat_rows.check_roles(found.prompt + answer, [*pair.prompt, *messages], tokenizer)
        (chosen, rejected), first = found.answers, len(found.prompt)
        sample = chat_rows.EncodedSample(
            messages=[*pair.prompt, *pair.chosen, *pair.rejected],
            question_hash=chat_rows.hash_question([*pair.prompt, *pair.chosen]),
            ids=found.prompt + chosen + rejected,
            labels=[IGNORED] * first + found.targets[0] + found.targets[1],
            reason=_why_lost(found, truncation),
            dropped_rounds=found.dropped_rounds,
            cut_tokens=found.cut_tokens,
            branches=(first, first + len(chosen)),
        )
        samples.append(sample)
    return chat_rows.join_samples(tokenizer, samples)


def _why_lost(found: EncodedPair, truncation: chat_rows.Truncation) -> str:
    if truncation == "drop" and found.cut_tokens:
        return chat_rows.TOO_LONG
    if any(all(label == IGNORED for label in targets) for targets in found.targets):
        return chat_rows.NO_TARGET
    return EQUAL if found.answers[0] == found.answers[1] else ""
