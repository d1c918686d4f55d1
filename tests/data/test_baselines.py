import collections
import math
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bc2_jax.data.baselines import bigram_cross_entropy, unigram_cross_entropy, unigram_entropy

V = 8
ROWS = st.integers(2, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([2, 3, 4, 5, 6]), min_size=width, max_size=width), min_size=1, max_size=12
    )
)


def scored_pairs(rows: list[list[int]]) -> list[tuple[int, int]]:
    return [(u, w) for row in rows for u, w in zip(row[:-1], row[1:], strict=True) if u not in (0, 2) and w != 0]


def reference_discount(counts: list[int]) -> float:
    once, twice = counts.count(1), counts.count(2)
    return once / (once + 2 * twice) if once else 0.5


def reference_discounted(counts: dict[int, int], w: int) -> float:
    d, total = reference_discount(list(counts.values())), sum(counts.values())
    return max(counts.get(w, 0) - d, 0) / total + d * len(counts) / total / V


def reference_bigram(pairs: list[tuple[int, int]], u: int, w: int) -> float:
    counts = collections.Counter(pairs)
    d = reference_discount(list(counts.values()))
    q = reference_discounted(collections.Counter(b for _, b in counts), w)
    total = sum(1 for a, _ in pairs if a == u)
    if total == 0:
        return q
    return max(counts[u, w] - d, 0) / total + d * sum(1 for a, _ in counts if a == u) / total * q


def array(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, np.uint32)


@given(ROWS, ROWS)
def test_against_dictionaries(train: list[list[int]], held_out: list[list[int]]) -> None:
    train_pairs, pairs = scored_pairs(train), scored_pairs(held_out)
    assume(train_pairs and pairs)
    unigram = collections.Counter(w for _, w in train_pairs)
    expected = -sum(math.log(reference_discounted(unigram, w)) for _, w in pairs) / len(pairs)
    assert unigram_cross_entropy(array(train), array(held_out), V) == pytest.approx(expected)
    expected = -sum(math.log(reference_bigram(train_pairs, u, w)) for u, w in pairs) / len(pairs)
    assert bigram_cross_entropy(array(train), array(held_out), V) == pytest.approx(expected)
    shares = [n / len(pairs) for n in collections.Counter(w for _, w in pairs).values()]
    assert unigram_entropy(array(held_out), V) == pytest.approx(-sum(p * math.log(p) for p in shares))


@given(ROWS, st.sampled_from([1, 3, 4, 7]))
def test_probabilities_sum_to_one(train: list[list[int]], context: int) -> None:
    """After any context, seen or new. Targets 1..V - 1 are scored one by one; padding, 0, never is."""
    pairs = scored_pairs(train)
    assume(pairs)
    for cross_entropy, of_padding in (
        (bigram_cross_entropy, reference_bigram(pairs, context, 0)),
        (unigram_cross_entropy, reference_discounted(collections.Counter(w for _, w in pairs), 0)),
    ):
        total = sum(math.exp(-cross_entropy(array(train), array([[context, w]]), V)) for w in range(1, V))
        assert total + of_padding == pytest.approx(1)


@given(ROWS)
def test_no_model_of_frequencies_beats_the_entropy(rows: list[list[int]]) -> None:
    assume(scored_pairs(rows))
    assert unigram_cross_entropy(array(rows), array(rows), V) >= unigram_entropy(array(rows), V) - 1e-9


def test_recovers_a_known_markov_chain() -> None:
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(20, 0.5), size=20)
    tokens = [0]
    for u in rng.random(60_000):
        tokens.append(min(int(np.searchsorted(np.cumsum(chain[tokens[-1]]), u)), 19))
    rows = (np.array(tokens[: 60_000 // 50 * 50]).reshape(-1, 50) + 3).astype(np.uint32)
    train, held_out = rows[:1000], rows[1000:]
    pairs = np.array(scored_pairs(held_out.tolist())) - 3
    truth = -np.log(chain[pairs[:, 0], pairs[:, 1]]).mean()
    bigram, unigram = bigram_cross_entropy(train, held_out, 23), unigram_cross_entropy(train, held_out, 23)
    assert truth - 0.01 < bigram < truth + 0.02 < unigram


def test_two_million_tokens_take_about_a_second() -> None:
    rows = (np.random.default_rng(0).zipf(1.3, (8000, 257)) % 4000 + 3).astype(np.uint32)
    begin = time.process_time()
    bigram_cross_entropy(rows, rows[:400], 4096)
    assert time.process_time() - begin < 3


def test_of_conversations_the_answers_count() -> None:
    start, target = 1 << 30, 1 << 31
    rows = np.array([[start | 1, 3, 4 | target, 5 | target, start | 1, 6, 7 | target, 0]], np.uint32)
    alone = np.array([[3, 4, 5, 2, 6, 7, 0, 0]], np.uint32)  # 5 -> 2 is one more
    assert unigram_entropy(rows, V) == pytest.approx(math.log(3))
    assert unigram_entropy(alone, V) == pytest.approx(math.log(4))


def test_rows_that_can_not_be_scored() -> None:
    good = array([[3, 4, 5]])
    with pytest.raises(ValueError, match="vocab_size = 5 is not valid: the rows have token 5"):
        bigram_cross_entropy(good, good, 5)
    with pytest.raises(ValueError, match=r"rows of shape \(1, 3\) are not valid: they have no target"):
        unigram_cross_entropy(good, array([[0, 0, 0]]), 8)
