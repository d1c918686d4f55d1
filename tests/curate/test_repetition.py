"""Repetition against plain loops over the tokens."""

from __future__ import annotations

import collections

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.statistics import (
    bounded,
    document_keys,
    duplicate_share,
    first_occurrences,
    hash_segments,
    segment_sums,
    top_share,
)
from bc2_jax.curate.tokens import Tokens, choose_tokens, code_points, hash_tokens, slice_tokens, token_pieces

WORDS = st.lists(st.lists(st.sampled_from("abcd"), max_size=30), max_size=6)


def tokens_of(documents: list[list[str]]) -> Tokens:
    return hash_tokens([" ".join(words) for words in documents])


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), max_size=300))
def test_first_occurrences_are_those_of_a_dict(keys):
    first: dict[int, int] = {}
    expected = [first.setdefault(key, i) for i, key in enumerate(keys)]
    assert first_occurrences(np.array(keys, np.uint64)).tolist() == expected


def test_first_occurrences_settle_keys_that_differ_in_one_bit():
    keys = np.uint64(1) << np.arange(64, dtype=np.uint64)
    assert first_occurrences(np.tile(keys, 3)).tolist() == list(range(64)) * 3


@given(WORDS, st.integers(1, 5))
def test_top_share_is_that_of_counting(documents, n):
    expected = []
    for words in documents:
        grams = collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        most = max(grams.values(), default=0)
        expected.append(n * most / len(words) if most > 1 else 0)
    np.testing.assert_allclose(top_share(tokens_of(documents), n), expected)


@given(WORDS, st.integers(1, 5))
def test_duplicate_share_counts_each_token_of_a_later_occurrence_once(documents, n):
    expected = []
    for words in documents:
        seen, covered = set(), set()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            covered |= set(range(i, i + n)) if gram in seen else set()
            seen.add(gram)
        expected.append(len(covered) / max(len(words), 1))
    np.testing.assert_allclose(duplicate_share(tokens_of(documents), n), expected)


@given(WORDS)
def test_longer_ngrams_repeat_no_more_than_shorter_ones(documents):
    tokens = tokens_of(documents)
    assert (duplicate_share(tokens, 4) <= duplicate_share(tokens, 3)).all()
    assert (top_share(tokens, 4) / 4 <= top_share(tokens, 3) / 3 + 1e-12).all()


def test_bounded_computes_only_what_is_needed():
    tokens = tokens_of([list("abab"), list("abab"), [], list("abcd")])
    result = bounded(top_share, tokens, 2, np.array([False, True, True, True]))
    np.testing.assert_allclose(result, [0, 1, 0, 0])


@given(WORDS, st.data())
def test_choices_and_pieces_give_the_tokens_of_documents(documents, data):
    tokens = tokens_of(documents)
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(documents)))))) if documents else []
    taken = choose_tokens(tokens, np.isin(np.arange(len(documents)), chosen))
    expected = tokens_of([documents[i] for i in chosen])
    np.testing.assert_array_equal(taken.hashes, expected.hashes)
    np.testing.assert_array_equal(taken.offsets, expected.offsets)
    seen = 0
    for start, piece in token_pieces(tokens, 20):
        assert start == seen
        seen += len(piece.offsets) - 1
        np.testing.assert_array_equal(piece.hashes, slice_tokens(tokens, start, seen).hashes)
        assert len(piece.hashes) <= 20 or len(piece.offsets) == 2
    assert seen == len(documents)


@given(st.lists(st.text("ab \U0001f600", max_size=4), min_size=1, max_size=20))
def test_hashes_of_segments_are_equal_when_their_characters_are(lines):
    points, offsets = code_points([line + "\n" for line in lines])
    hashes = hash_segments(points, offsets[:-1])
    for a, first in zip(lines, hashes, strict=True):
        for b, second in zip(lines, hashes, strict=True):
            assert (first == second) == (a == b)


def test_a_final_newline_does_not_change_the_hash_of_a_segment():
    points, offsets = code_points(["a line\n", "a line"])
    assert len(set(hash_segments(points, offsets[:-1]).tolist())) == 1


def test_keys_are_equal_only_within_a_document():
    keys = document_keys(tokens_of([["a", "a"], ["a"]]))
    assert keys[0] == keys[1] != keys[2]


def test_sums_of_empty_segments_are_zero():
    assert segment_sums(np.array([1, 2, 3]), np.array([0, 0, 2, 3, 3])).tolist() == [0, 3, 3, 0]
