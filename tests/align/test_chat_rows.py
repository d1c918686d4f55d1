"""Which samples share a row, and what of a conversation is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.align.chat import drop_oldest_rounds, encode_conversation
from bc2_jax.align.chat_rows import encode_samples, pack_best_fit
from bc2_jax.data.row_file import START, TARGET
from bc2_jax.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "align"


def best_fit_plainly(lengths: list[int], capacity: int) -> list[list[int]]:
    """As one would say it, in quadratic time."""
    bins: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        filled = [sum(lengths[i] for i in places) for places in bins]
        fits = [number for number, size in enumerate(filled) if size + lengths[place] <= capacity]
        if fits:
            bins[max(fits, key=lambda number: filled[number])].append(place)
        else:
            bins.append([place])
    return bins


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=40), st.just(c))))
def test_bins_are_those_of_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = pack_best_fit(lengths, capacity)
    assert sorted(place for places in bins for place in places) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in places) <= capacity for places in bins)
    assert bins == sorted(sorted(places) for places in bins) == pack_best_fit(np.array(lengths, np.int32), capacity)
    # Equally full bins are the same for what comes later: the fill of the bins does not depend on which was taken.
    fills = sorted(sum(lengths[i] for i in places) for places in bins)
    assert fills == sorted(sum(lengths[i] for i in places) for places in best_fit_plainly(lengths, capacity))


def test_no_more_bins_than_the_golden_ones() -> None:
    golden = json.loads((GOLDEN / "packing.json").read_text())
    assert len(pack_best_fit(golden["lengths"], golden["capacity"])) <= golden["best_fit_decreasing_bins"]


def test_lengths_that_do_not_fit_are_refused() -> None:
    assert pack_best_fit([], 5) == []
    for lengths, wrong in (([3, 6], 6), ([0, 5], 0)):
        with pytest.raises(ValueError, match=rf"lengths has {wrong}, which is not valid: each must be in 1\.\.5"):
            pack_best_fit(lengths, 5)


TEXT = st.text(st.sampled_from("ab c\n汉<reserved_106>"), min_size=1, max_size=12).map(lambda text: text + ".")
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)
CONVERSATION = st.tuples(st.none() | TEXT, ROUNDS)


def messages_of(conversation: tuple[str | None, list[tuple[str, str]]]) -> list[dict[str, str]]:
    system, rounds = conversation
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in rounds:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def read_samples(tokens: np.ndarray, lengths: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each sample, by what its flags mean."""
    samples = []
    for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
        here = tokens[end - length : end].tolist()
        assert [bool(token & int(START)) for token in here] == [i == 0 for i in range(length)]
        ids = [token & ((1 << 30) - 1) for token in here]
        labels = [(2 if i == 195 else i) if token & int(TARGET) else -100 for i, token in zip(ids, here, strict=True)]
        samples.append((ids, [*labels[1:], -100][:length]))
    return samples


@given(st.lists(CONVERSATION, min_size=1, max_size=5), st.integers(1, 60), st.sampled_from(["rounds", "right", "drop"]))
def test_samples_are_encoded_as_each_alone(
    tokenizer: Tokenizer, conversations: list, max_length: int, truncation: str
) -> None:
    batch = [messages_of(conversation) for conversation in conversations]
    assert not len(encode_samples(tokenizer, [], max_length).tokens)
    found = encode_samples(tokenizer, batch, max_length, truncation)
    samples = read_samples(found.tokens, found.lengths)
    for i, messages in enumerate(batch):
        whole = len(encode_conversation(tokenizer, messages)[0])
        kept, dropped = messages, 0
        if truncation == "rounds":
            kept, dropped = drop_oldest_rounds(tokenizer, messages, max_length)
        expected = encode_conversation(tokenizer, kept, max_length)
        is_lost = set(expected[1]) == {-100} or (truncation == "drop" and whole > max_length)
        assert samples[i] == (([], []) if is_lost else expected)
        assert found.dropped_rounds[i] == dropped
        assert found.cut_tokens[i] == max(0, len(encode_conversation(tokenizer, kept)[0]) - max_length)
        text = "".join(message["content"] for message in messages)
        assert (found.characters[i], found.bytes[i]) == (len(text), len(text.encode()))


def test_the_side_of_a_sample_is_decided_by_its_question(tokenizer: Tokenizer) -> None:
    first = messages_of(("You are kind.", [("How?", "So."), ("Why?", "Because.")]))
    others = [messages_of(("You are kind.", [("How?", "Otherwise.")])), messages_of((None, [("How?", "So.")]))]
    hashes = encode_samples(tokenizer, [first, *others], 100).hashes.tolist()
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_tokenizer_that_confuses_padding_or_roles_is_refused(tokenizer: Tokenizer) -> None:
    class Confused(Tokenizer):
        """Spells a letter by an id that means something else."""

        def __init__(self, token: int) -> None:
            super().__init__(tokenizer.path)
            self.token = token

        def encode_batch(self, texts, *, num_threads=-1):
            return [
                [self.token] * text.count("x") + ids
                for text, ids in zip(texts, super().encode_batch(texts), strict=True)
            ]

    messages = messages_of((None, [("a", "x")]))
    path = re.escape(repr(str(tokenizer.path)))
    with pytest.raises(
        ValueError, match=f"tokenizer = {path} can't spell all of the text: packing needs byte fallback"
    ):
        encode_samples(Confused(0), [messages], 50)
    with pytest.raises(ValueError, match=f"{path} is not valid: 1 user messages have 2 tokens 195, so that text makes"):
        encode_samples(Confused(195), [messages], 50)
