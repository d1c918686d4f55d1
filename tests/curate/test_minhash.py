"""Signatures against exact Jaccard similarities."""

import numpy as np
import pytest

from bc2_jax.curate import minhash
from bc2_jax.curate.tokens import hash_tokens


def shingles(words):
    return {tuple(words[i : i + minhash.SHINGLE]) for i in range(len(words) - minhash.SHINGLE + 1)}


def make_pairs(length: int, count: int, edits: int):
    """Texts, edited copies and their exact similarities."""
    rng = np.random.default_rng(length)
    pairs = []
    for _ in range(count):
        words = [f"w{i}" for i in rng.integers(0, 5000, length)]
        copy = list(words)
        for place in rng.integers(0, length, rng.integers(0, edits)):
            copy[place] = f"x{rng.integers(0, 5000)}"
        one, other = shingles(words), shingles(copy)
        pairs.append((" ".join(words), " ".join(copy), len(one & other) / len(one | other)))
    return [list(column) for column in zip(*pairs, strict=True)]


@pytest.mark.parametrize("length, edits", [(40, 5), (120, 12), (600, 60)])
def test_the_estimate_is_unbiased_with_the_error_of_128_values(length, edits):
    texts, copies, jaccard = make_pairs(length, 600, edits)
    exact = np.array(jaccard)
    one, other = (minhash.signatures(hash_tokens(x)) for x in (texts, copies))
    error = minhash.similarity(one, other) - exact
    expected = np.sqrt((exact * (1 - exact)).mean() / minhash.VALUES)
    assert abs(error.mean()) < 4 * expected / np.sqrt(len(exact))
    # Sampling without replacement from the few shingles of a short document errs less.
    assert 0.5 * expected < error.std() < 1.25 * expected


def test_bands_find_pairs_as_often_as_they_should():
    texts, copies, jaccard = make_pairs(200, 1500, 25)
    exact = np.array(jaccard)
    keys = []
    for group in (texts, copies):
        index, key = minhash.bands(minhash.signatures(hash_tokens(group)))
        assert np.array_equal(index, np.repeat(np.arange(len(group)), minhash.BANDS))
        keys.append(key.reshape(len(group), minhash.BANDS))
    found = (keys[0] == keys[1]).any(1)
    probability = 1 - (1 - exact**minhash.ROWS) ** minhash.BANDS
    for low, high in ((0.3, 0.6), (0.6, 0.8), (0.8, 1.01)):
        here = (exact >= low) & (exact < high)
        assert here.sum() > 50
        assert found[here].mean() == pytest.approx(probability[here].mean(), abs=0.06)


def test_short_documents_are_similar_to_nothing():
    signature = minhash.signatures(hash_tokens(["", "one two three four", "one two three four five"]))
    assert (signature[:2] == minhash.EMPTY).all() and (signature[2] != minhash.EMPTY).all()
    assert minhash.similarity(signature, signature).tolist() == [0, 0, 1]
    assert set(minhash.bands(signature)[0].tolist()) == {2}


def test_a_signature_does_not_depend_on_its_neighbours():
    texts, copies, _ = make_pairs(50, 20, 5)
    together = minhash.signatures(hash_tokens(texts + copies))
    assert np.array_equal(together[3], minhash.signatures(hash_tokens([texts[3]]))[0])


def test_signatures_stay_what_they_are():
    """Stages read signatures that earlier runs wrote."""
    signature = minhash.signatures(hash_tokens(["the quick brown fox jumps over the lazy dog 好好学习天天向上"]))
    assert signature[0, [0, 1, 63, 127]].tolist() == [3403008632, 1869603201, 2458968373, 415489052]
