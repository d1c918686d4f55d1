"""Which rows hold the beginning of a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.serve.prefixes import Prefixes, hash_chunks


def test_a_chunk_is_known_by_all_ids_up_to_its_end_its_owner_and_its_stretch():
    ids = list(range(10))
    hashes = hash_chunks(ids, 4, "a")
    assert len(hashes) == 2, "the last two ids are no whole chunk"
    assert hash_chunks([*ids[:8], 99], 4, "a") == hashes
    assert hash_chunks([*ids[:7], 99], 4, "a")[0] == hashes[0] != hashes[1]
    assert hash_chunks([99, *ids[1:]], 4, "a")[1] != hashes[1]
    assert not set(hash_chunks(ids, 4, "b")) & set(hashes)
    assert not set(hash_chunks(ids, 4, "a", 1.5)) & set(hashes)
    assert hash_chunks(ids, 4, "a", 1.0) == hashes
    # The same ids at another place are another chunk.
    assert len(set(hash_chunks([1, 2] * 4, 2, ""))) == 4


def test_the_longest_match_of_a_part_is_found():
    prefixes = Prefixes(rows=4, parts=2)
    long, other = hash_chunks(range(8), 2, ""), hash_chunks([0, 1, 9, 9], 2, "")
    prefixes.hold(0, long[:2])
    prefixes.hold(1, long[:3])
    prefixes.hold(2, other)
    assert prefixes.find(0, long) == (1, 3)
    assert prefixes.find(0, long[:1])[1] == 1
    assert prefixes.find(1, long) == (2, 1)
    prefixes.hold(1, [])
    assert prefixes.find(0, long) == (0, 2)
    assert prefixes.find(0, hash_chunks([5, 5], 2, ""))[1] == 0


def test_the_row_that_holds_most_is_chosen_then_the_part_that_does():
    prefixes = Prefixes(rows=6, parts=2)
    hashes = hash_chunks(range(8), 2, "")
    assert prefixes.choose([5, 0, 1], hashes) == 0, "of the part with the most free rows"
    prefixes.hold(4, hashes[:2])
    assert prefixes.choose([0, 1, 2, 3, 4, 5], hashes) == 4
    assert prefixes.choose([0, 1, 2, 3, 5], hashes) == 3, "of the same part as row 4, the first"
    prefixes.hold(0, hashes[:3])
    assert prefixes.choose([5, 4, 3, 2, 1], hashes) == 2
    assert prefixes.count_held(4, hashes) == 2 and prefixes.count_held(1, hashes) == 0


prompts = st.lists(st.sampled_from([0, 1]), max_size=8)


@given(st.lists(st.tuples(st.integers(0, 3), prompts), max_size=20), prompts)
def test_find_equals_a_search_through_all_rows(holds, wanted):
    prefixes, held = Prefixes(rows=4, parts=2), [[]] * 4
    for row, ids in holds:
        held[row] = ids
        prefixes.hold(row, hash_chunks(ids, 2, ""))

    def common(ids) -> int:
        whole = min(len(ids), len(wanted)) // 2
        return next((i for i in range(whole) if ids[2 * i : 2 * i + 2] != wanted[2 * i : 2 * i + 2]), whole)

    for part in (0, 1):
        own = {row: common(held[row]) for row in (2 * part, 2 * part + 1)}
        row, count = prefixes.find(part, hash_chunks(wanted, 2, ""))
        assert count == max(own.values()) and own[row] == count
        for row, expected in own.items():
            assert prefixes.count_held(row, hash_chunks(wanted, 2, "")) == expected
