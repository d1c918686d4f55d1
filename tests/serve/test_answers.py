"""Tokens as text: pieces that are final, log-probabilities with bytes and offsets."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.infer.text import TextStream
from bc2_jax.serve.answers import AnswerText, CompletionLogProbs, chat_log_probs, token_bytes, token_text
from bc2_jax.serve.requests import TokenScore

# Of the tokenizer of 640 pieces: special ones, bytes, and pieces, some twice as often.
IDS = st.lists(st.integers(0, 643) | st.integers(199, 460), max_size=40)


@given(IDS)
def test_pieces_together_are_the_text(tokenizer, ids):
    answer = AnswerText(tokenizer, [])
    pieces = [answer.add([i]) for i in ids] + [answer.finish()]
    found = [piece for piece in pieces if piece is not None]
    assert "".join(piece.text for piece in found) == tokenizer.decode(ids)
    assert [i for piece in found for i in piece.ids] == ids and answer.tokens == len(ids)


@given(IDS, st.lists(st.text("abet \ufffd", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_text_ends_the_answer_where_it_first_is(tokenizer, ids, stop):
    answer = AnswerText(tokenizer, stop)
    pieces = [piece for piece in [*(answer.add([i]) for i in ids), answer.finish()] if piece is not None]
    text, whole = "".join(piece.text for piece in pieces), tokenizer.decode(ids)
    assert whole.startswith(text) and not any(one in text for one in stop)
    if "\ufffd" not in whole:
        ends = [whole.find(one) + len(one) for one in stop if one in whole]
        assert answer.stopped == bool(ends) and (ends or text == whole)
        if ends:
            assert any(whole.startswith(text + one) and len(text + one) == min(ends) for one in stop)
            with_stop = itertools.accumulate(len(tokenizer.decode([i])) for i in ids)
            assert answer.tokens <= len(ids) and (answer.tokens == len(ids) or any(n >= min(ends) for n in with_stop))


def test_the_work_for_a_token_does_not_grow(tokenizer):
    """Also where no character is ever whole."""
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    first_byte = next(i for i in range(640) if tokenizer.is_byte(i))
    for ids in ([500] * 300, [first_byte + 0xE4] * 300, [500, first_byte + 0xF0] * 150):
        stream = TextStream(decode, ["never"])
        assert "".join([*map(stream.add, ids), stream.finish()]) == tokenizer.decode(ids)
    assert longest <= 17


def test_no_two_tokens_are_written_alike(tokenizer):
    names = [token_text(tokenizer, i) for i in range(tokenizer.vocab_size + 9)]
    assert len(set(names)) == len(names)


@given(IDS)
def test_bytes_together_are_the_text(tokenizer, ids):
    content = b"".join(token_bytes(tokenizer, i) for i in ids)
    text = tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert content.decode() == text
    entries = chat_log_probs(tokenizer, [TokenScore(i, -1.0, ()) for i in ids])["content"]
    assert b"".join(bytes(entry["bytes"] or []) for entry in entries) == content


@given(IDS, st.integers(0, 40))
def test_offsets_are_those_of_the_text(tokenizer, ids, cut):
    """Each token begins where the text of those before it ends, but inside a character, where that one begins."""
    log_probs = CompletionLogProbs(tokenizer)
    lists = [log_probs.lists(part, [None] * len(part)) for part in (ids[:cut], ids[cut:])]
    offsets = [offset for one in lists for offset in one["text_offset"]]
    text = tokenizer.decode(ids)
    for i, offset in enumerate(offsets):
        before = tokenizer.decode(ids[:i])
        whole = before.rstrip("\ufffd")
        assert len(whole) <= offset <= len(before) and text.startswith(whole)
        if whole == before:
            assert offset == len(before)


def test_the_own_value_is_among_the_most_likely(tokenizer):
    """lm-eval compares floats for equality: a token is greedy if its own is the largest."""
    lists = CompletionLogProbs(tokenizer).lists(
        [500, 501, 502], [None, TokenScore(501, -0.25, ((501, -0.25), (7, -3.0))), TokenScore(502, -4.5, ((9, -0.5),))]
    )
    assert lists["token_logprobs"] == [None, -0.25, -4.5] and lists["top_logprobs"][0] is None
    greedy, other = lists["top_logprobs"][1:]
    assert max(greedy.values()) == -0.25 and max(other.values()) == -0.5 and len(other) == 2
    assert other[token_text(tokenizer, 502)] == -4.5


@pytest.mark.parametrize("value", [-math.inf, -1e9])
def test_a_token_without_probability_is_a_number(tokenizer, value):
    entry = chat_log_probs(tokenizer, [TokenScore(500, value, ((500, value),))])["content"][0]
    assert entry["logprob"] == -9999.0 == entry["top_logprobs"][0]["logprob"]
