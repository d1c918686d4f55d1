"""Prompts and their letters; random shots do not depend on the order of a file."""

from __future__ import annotations

import random

import pytest

from bc2_jax.evaluate.tasks.choices import CEVAL, MMLU, Item, choose, make_examples, partition

ITEMS = [Item(f"s/{n}", f"q{n}", ("a", "b", "c", "d"), n % 4) for n in range(9)]


def test_letters_as_shown_and_bare():
    english, chinese = (make_examples(ITEMS[5:6], ITEMS[:1], wording, "x", "g")[0] for wording in (MMLU, CEVAL))
    assert english.choices == (" A", " B", " C", " D")
    assert chinese.choices == english.bare == chinese.bare == ("A", "B", "C", "D")
    assert english.gold == chinese.gold == (1,)
    # A shot is its question with the letter as shown.
    for one, wording in ((english, MMLU), (chinese, CEVAL)):
        assert one.shots[0] == wording.ask(ITEMS[0]) + one.choices[0] + wording.end


def test_five_options_and_hidden_answers():
    item = Item("s/0", "q", ("a", "b", "c", "d", "e"), None)
    asked = make_examples([item], [], MMLU, "x", "g")[0]
    assert asked.prompt.endswith("\nE. e\nAnswer:")
    assert (asked.bare, asked.gold) == (tuple("ABCDE"), ())
    with pytest.raises(AssertionError, match="needs its answer"):
        MMLU.show(item)


def test_random_shots():
    shots, asked = partition(ITEMS, 5)
    assert [item.id for item in shots] != sorted(item.id for item in shots)
    assert asked == [item for item in ITEMS if item not in shots]
    mixed = random.Random(0).sample(ITEMS, len(ITEMS))
    assert choose(iter(mixed), 5) == shots
    assert len({tuple(item.id for item in choose(ITEMS[k:], 3)) for k in range(4)}) > 1
    # Something is left to ask however few there are.
    assert [len(part) for part in partition(ITEMS[:3], 5)] == [2, 1]
    assert partition([], 5) == ([], [])
