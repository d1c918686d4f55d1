"""Hashed tokens against a regular expression and Python's own strings."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.tokens import code_points, hash_ngrams, hash_tokens, hash_values, pieces

TEXTS = st.lists(st.text(st.sampled_from("ab_1 好世,。\n\u00e9\U0001f600"), max_size=40), max_size=8)


def split(text: str) -> list[str]:
    return re.findall(r"[好世]|[ab_1\u00e9]+", text)


@given(TEXTS)
def test_equal_tokens_and_only_they_have_equal_hashes(texts):
    tokens = hash_tokens(texts)
    expected = [split(text) for text in texts]
    assert np.diff(tokens.offsets).tolist() == [len(words) for words in expected]
    names: dict[int, str] = {}
    for value, word in zip(tokens.hashes.tolist(), [word for words in expected for word in words], strict=True):
        assert names.setdefault(value, word) == word
    assert len(set(names.values())) == len(names)


@given(TEXTS, st.integers(1, 4))
def test_ngrams_stay_in_their_document(texts, n):
    ngrams = hash_ngrams(hash_tokens(texts), n)
    expected = [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in map(split, texts)]
    assert np.diff(ngrams.offsets).tolist() == [len(grams) for grams in expected]
    names: dict[int, tuple[str, ...]] = {}
    for value, gram in zip(ngrams.hashes.tolist(), [g for grams in expected for g in grams], strict=True):
        assert names.setdefault(value, gram) == gram
    assert len(set(names.values())) == len(names)


@given(TEXTS, st.integers(1, 30))
def test_pieces_lose_nothing(texts, characters):
    parts = list(pieces(texts, characters))
    assert [text for part in parts for text in part] == texts
    assert all(sum(map(bool, part)) <= 1 or sum(map(len, part)) <= characters for part in parts)


def test_a_hash_does_not_depend_on_the_piece():
    words = [f"word{i}" for i in range(60_000)]
    whole = hash_tokens([" ".join(words)])
    apart = hash_tokens(words)
    assert np.array_equal(whole.hashes, apart.hashes)
    assert len(np.unique(whole.hashes)) == len(words)


def test_marks_belong_to_their_word_and_other_scripts_have_words():
    tokens = hash_tokens(["e\u0301te\u0301", "слово ещё", "ไทย", "한국 말", "かな"])
    assert np.diff(tokens.offsets).tolist() == [1, 2, 3, 2, 2]


def test_hashes_of_stretches():
    values, _ = code_points(["abcabc-abc"])
    first, second, third = hash_values(values, np.array([0, 3, 7]), np.array([3, 6, 10])).tolist()
    assert first == second == third
    ab, ca = hash_values(values, np.array([0, 2]), np.array([2, 4])).tolist()
    assert len({first, ab, ca}) == 3
    assert hash_values(values, np.array([0, 3])).tolist()[0] == first
