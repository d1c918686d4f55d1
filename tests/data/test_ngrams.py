import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.data.ngrams import HashSet, ItemHit, ItemOverlap, hash_ngrams, hash_positions, mix

SHORT = st.lists(st.integers(0, 2), max_size=60)


def scalar_mix(value: int) -> int:
    """The finaliser of MurmurHash3 as published."""
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD % 2**64
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 % 2**64
    return value ^ (value >> 33)


def test_mix_is_the_finaliser_of_murmur() -> None:
    assert int(mix(np.ones(1, np.uint64))[0]) == scalar_mix(1) == 0xB456BCFC34C2CB2C
    values = np.array([1, 2**63, 2**64 - 1], np.uint64)
    assert mix(values).tolist() == [scalar_mix(int(value)) for value in values]
    assert values.tolist() == [1, 2**63, 2**64 - 1]  # left alone


@given(SHORT, st.integers(1, 20))
def test_hashes_are_equal_exactly_where_ngrams_are(tokens: list[int], n: int) -> None:
    hashes = hash_ngrams(np.array(tokens, np.int32), n)
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert hashes.dtype == np.uint64 and len(hashes) == len(ngrams)
    assert len(set(hashes.tolist())) == len(set(ngrams))
    assert len(set(zip(hashes.tolist(), ngrams, strict=True))) == len(set(ngrams))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.data())
def test_an_ngram_has_one_hash_wherever_it_stands(tokens: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(tokens)))
    whole = hash_ngrams(np.array(tokens, np.uint32), n)
    for start in range(len(tokens) - n + 1):
        assert hash_ngrams(np.array(tokens[start : start + n], np.int64), n).tolist() == [whole[start]]


def test_ngrams_of_different_lengths_and_orders_differ() -> None:
    zeros = np.zeros(40, np.uint32)
    assert len({int(hash_ngrams(zeros, n)[0]) for n in range(1, 41)}) == 40
    assert hash_ngrams(np.array([1, 2]), 2) != hash_ngrams(np.array([2, 1]), 2)


def test_many_ngrams_have_no_collision() -> None:
    """Half a million that differ in few bits: by chance there would be one in 10^8 tries."""
    tokens = np.arange(500_000, dtype=np.uint32) % 707
    tokens[::708] += 1
    ngrams = np.lib.stride_tricks.sliding_window_view(tokens, 3)
    packed = ngrams[:, 0].astype(np.int64) << 40 | ngrams[:, 1].astype(np.int64) << 20 | ngrams[:, 2]
    assert len(np.unique(hash_ngrams(tokens, 3))) == len(np.unique(packed))


def test_bad_length() -> None:
    with pytest.raises(ValueError, match="n = 0 is not valid: it must be positive"):
        hash_ngrams(np.zeros(3, np.uint32), 0)


@given(SHORT, SHORT)
def test_sequences_can_be_hashed_in_pieces(left: list[int], right: list[int]) -> None:
    def total(tokens: list[int], start: int) -> int:
        positions = np.arange(start, start + len(tokens))
        return int(hash_positions(np.array(tokens, np.uint32), positions).sum(dtype=np.uint64))

    whole = total(left + right, 0)
    assert (total(left, 0) + total(right, len(left))) % 2**64 == whole
    if left != right:
        assert total(left, 0) != total(right, 0)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_look_ups(members: list[int], strangers: list[int]) -> None:
    known = HashSet(np.array(members, np.uint64))
    asked = np.array(members[::2] + strangers + members[1::2], np.uint64)
    places, entries = known.find(asked)
    assert places.tolist() == [i for i, value in enumerate(asked.tolist()) if value in members]
    assert known.hashes[entries].tolist() == asked[places].tolist()


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=6),
    st.lists(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5), max_size=3),
    st.integers(1, 5),
)
def test_overlap_is_what_a_search_by_hand_finds(items: list[list[int]], streams: list[list[list[int]]], n: int) -> None:
    overlap = ItemOverlap([hash_ngrams(np.array(item, np.uint32), n) for item in items], n)
    first: dict[tuple[int, ...], tuple[int, int]] = {}
    for number, chunks in enumerate(streams):
        start = 0
        for chunk in chunks:
            overlap.add(number, start, np.array(chunk, np.uint32))
            start += len(chunk)
        whole = [token for chunk in chunks for token in chunk]
        for i in range(len(whole) - n + 1):
            first.setdefault(tuple(whole[i : i + n]), (number, i))
    expected = []
    for index, item in enumerate(items):
        ngrams = [tuple(item[i : i + n]) for i in range(len(item) - n + 1)]
        found = [first[ngram] for ngram in ngrams if ngram in first]
        if found:
            expected.append(ItemHit(index, len(ngrams), len(found), *found[0]))
    assert overlap.hits() == expected


def test_a_gap_is_not_bridged() -> None:
    overlap = ItemOverlap([hash_ngrams(np.array([1, 2, 3, 4]), 4)], 4)
    overlap.add(0, 0, np.array([1, 2], np.uint32))
    overlap.add(0, 3, np.array([3, 4], np.uint32))
    overlap.add(1, 5, np.array([3, 4], np.uint32))
    assert overlap.hits() == []
    overlap.add(2, 7, np.array([1, 2, 3], np.uint32))
    overlap.add(2, 10, np.array([4], np.uint32))
    assert overlap.hits() == [ItemHit(0, 1, 1, 2, 7)]
