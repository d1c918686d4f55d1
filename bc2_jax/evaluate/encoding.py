"""Texts -> token ids to score: (context, continuation) pairs, and windows of long texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bc2_jax.tokenizer import Tokenizer


class Request(NamedTuple):
    """Score `continuation` after `context`: token ids, at least one of each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Encoded(NamedTuple):
    """A pair of texts as token ids."""

    context: list[int]
    continuation: list[int]
    fallback: bool  # whether a token spans the border between both


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], prefix_id: int) -> list[Encoded]:
    """Encodes (context, continuation) pairs and splits them as lm-eval does.

    White space at the end of a context moves to the continuation. Both are encoded together; the continuation is what
    follows as many ids as the context has alone. If a token spans the border (`Encoded.fallback`), these ids may not
    spell the whole continuation, but they agree with lm-eval's. If no id follows (an error in lm-eval), the
    continuation is encoded alone. An empty context becomes `prefix_id`. Raises ValueError for other than two texts and
    for an empty continuation.
    """
    moved = [_move_space(number, pair) for number, pair in enumerate(pairs)]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    ids_of = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    encoded = []
    for (context, continuation), whole in zip(moved, wholes, strict=True):
        before = ids_of[context]
        after = whole[len(before) :]
        spans_border = not after or whole[: len(before)] != before
        after = after or tokenizer.encode(continuation)
        encoded.append(Encoded(list(before) or [prefix_id], after, spans_border))
    return encoded


def _move_space(number: int, pair: tuple[str, str]) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise ValueError(f"pairs[{number}] = {pair!r} is not valid: it must be two texts, context and continuation.")
    context, continuation = pair
    if not continuation:
        raise ValueError(f"pairs[{number}] has an empty continuation: there is nothing to score.")
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def cut_windows(ids: Sequence[int], prefix_id: int, length: int, stride: int) -> Iterator[Request]:
    """Windows that each feed at most `length` tokens and together score every token once.

    The first window scores the first `length` tokens after `prefix_id`. Each further one scores the next `stride`
    (<= length) tokens after as much context as fits: one token if stride = length (as in lm-eval), more in the last.
    """
    scored = min(length, len(ids))
    if scored:
        yield Request([prefix_id], ids[:scored])
    while scored < len(ids):
        end = min(scored + stride, len(ids))
        yield Request(ids[end - length - 1 : scored], ids[scored:end])
        scored = end
