"""The queue: bounds, shares of owners, turns between them, deadlines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.infer.settings import Settings
from bc2_jax.serve.requests import Handle, Request
from bc2_jax.serve.waiting import QueueLimits, Waiting


def handle(owner: str = "", tokens: int = 3) -> Handle:
    request = Request(tuple(range(tokens)), Settings(max_new_tokens=1, eos_token_id=()), owner=owner)
    return Handle(request, 10, lambda handle: None)


def test_owners_take_turns_and_each_ones_requests_keep_their_order():
    waiting = Waiting(QueueLimits())
    handles = {name: handle(name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")}
    for one in handles.values():
        waiting.put(one)
    names = {one: name for name, one in handles.items()}
    assert [names[waiting.take()] for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(waiting) == 0


def test_an_owner_that_comes_back_waits_for_its_turn():
    waiting = Waiting(QueueLimits())
    a, b, later = handle("a"), handle("b"), handle("a")
    waiting.put(a)
    waiting.put(b)
    assert waiting.take() is a
    waiting.put(later)
    assert [waiting.take(), waiting.take()] == [b, later]


def test_the_queue_is_bounded_in_requests_beyond_the_free_rows():
    waiting = Waiting(QueueLimits(requests=2))
    for _ in range(3):
        assert waiting.why_full([handle()], free_rows=1) is None
        waiting.put(handle())
    assert waiting.why_full([handle()], 1) == "3 requests are waiting; at most 2 may."
    assert waiting.why_full([handle(), handle()], 2) is not None
    assert waiting.why_full([handle()], 2) is None


def test_the_queue_is_bounded_in_tokens():
    waiting = Waiting(QueueLimits(tokens=10))
    assert waiting.why_full([handle(tokens=20)], 0) is None, "one alone is always accepted"
    waiting.put(handle(tokens=5))
    assert waiting.why_full([handle(tokens=3)], 0) is None
    assert waiting.why_full([handle(tokens=4)], 0) == "The waiting requests would have 11 tokens; at most 10 may."
    assert waiting.why_full([handle(tokens=4)], 2) is None


def test_a_named_owner_has_a_share_and_the_others_keep_theirs():
    waiting = Waiting(QueueLimits(requests=4, owner_share=0.5))
    for _ in range(2):
        waiting.put(handle("a"))
    assert waiting.why_full([handle("a")], 0) == "2 requests of this key are waiting; at most 2 may."
    assert waiting.why_full([handle("b"), handle("b")], 0) is None
    waiting = Waiting(QueueLimits(requests=4, owner_share=0.5))
    for _ in range(3):
        waiting.put(handle())
    assert waiting.why_full([handle()], 0) is None, "requests of no owner are not told apart"


def test_what_waits_too_long_is_removed():
    waiting = Waiting(QueueLimits(queue_s=10))
    old, new = handle("a"), handle("b")
    new.submitted = old.submitted + 5
    waiting.put(old)
    waiting.put(new)
    assert waiting.remove_expired(old.submitted + 10) == []
    assert waiting.remove_expired(old.submitted + 11) == [old]
    assert list(waiting) == [new] and len(waiting) == 1
    assert not waiting.remove(old) and waiting.remove(new)


@pytest.mark.parametrize(("field", "value"), [("requests", 0), ("tokens", -1), ("queue_s", 0), ("total_s", 0)])
def test_limits_must_be_positive(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value} is not valid: it must be positive"):
        QueueLimits(**{field: value})
    with pytest.raises(ValueError, match="owner_share = 1.5 is not valid"):
        QueueLimits(owner_share=1.5)


@given(st.lists(st.tuples(st.sampled_from(["put", "take", "remove"]), st.sampled_from("abc")), max_size=60))
def test_counts_are_those_of_what_waits(actions):
    waiting, inside = Waiting(QueueLimits()), []
    for action, owner in actions:
        if action == "put":
            inside.append(handle(owner))
            waiting.put(inside[-1])
        elif inside and action == "take":
            inside.remove(waiting.take())
        elif inside:
            assert waiting.remove(inside.pop(0))
        assert len(waiting) == len(inside) and set(waiting) == set(inside)
    places = {waiting.place_of(one): one for one in inside}
    assert [places[i] for i in range(len(inside))] == [waiting.take() for _ in range(len(inside))]
    assert all(waiting.place_of(one) is None for one in inside)
