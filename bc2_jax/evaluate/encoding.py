"""Texts -> token ids to score: where a context ends and its continuation begins, windows of a long text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bc2_jax.tokenizer import Tokenizer


class Request(NamedTuple):
    """Token ids to score after others, at least one of each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Encoded(NamedTuple):
    """A pair of texts as token ids."""

    context: list[int]
    continuation: list[int]
    fallback: bool
    """Whether a token of both together reaches across the border between them."""


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], prefix_id: int) -> list[Encoded]:
    """Each (context, continuation) as ids, cut as lm-eval cuts them.

    White space at the end of a context belongs to the continuation, as tokens begin with a space. Both are encoded
    together, and the continuation is what follows after as many ids as the context has alone. Where a token reaches
    across the border (`Encoded.fallback`), the ids that follow may not spell the whole continuation; they are taken all
    the same, so that figures can be compared with lm-eval's. Where no id follows, which is an error in lm-eval, the
    continuation is encoded alone. A context without a token is `prefix_id`. Raises ValueError for something other than
    two texts, and for an empty continuation.
    """
    moved = [_move_space(number, pair) for number, pair in enumerate(pairs)]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    ids_of = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    encoded = []
    for (context, continuation), whole in zip(moved, wholes, strict=True):
        before = ids_of[context]
        after = whole[len(before) :]
        reaches_across = not after or whole[: len(before)] != before
        after = after or tokenizer.encode(continuation)
        encoded.append(Encoded(list(before) or [prefix_id], after, reaches_across))
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
    """A text in windows of which each feeds at most `length` tokens, so that every token is scored once.

    The first window scores the first `length` tokens, beginning with `prefix_id`; each further one scores the next
    `stride`, at most `length`, and has as context what precedes them, as much as fits: with a stride of `length` one
    token, and in the last window more. So does lm-eval for a stride of `length`.
    """
    scored = min(length, len(ids))
    if scored:
        yield Request([prefix_id], ids[:scored])
    while scored < len(ids):
        end = min(scored + stride, len(ids))
        yield Request(ids[end - length - 1 : scored], ids[scored:end])
        scored = end
