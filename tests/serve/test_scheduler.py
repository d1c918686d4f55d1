"""Rows, turns and results, on a fake engine whose tokens are right only if every slot is."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bc2_jax.infer.settings import Settings
from bc2_jax.serve.requests import Ended, Failed, Handle, PromptScored, Request, Started, Tokens
from bc2_jax.serve.scheduler import Scheduler
from bc2_jax.serve.stats import Stats
from bc2_jax.serve.turns import Runner, Shapes
from tests.serve.fake_engine import FakeEngine, continued, prompt_score

SHAPES = Shapes(rows=4, slots=64, chunk=8, steps=4)


def request(ids, new: int = 6, *, eos=(), seed: int = 0, **more) -> Request:
    return Request(tuple(ids), Settings(max_new_tokens=new, eos_token_id=tuple(eos), seed=seed), **more)


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(salt * 31 + i * i) % 97 for i in range(length)]


class Bench:
    """A scheduler on a fake engine, with the handles it was given."""

    def __init__(self, shapes: Shapes = SHAPES, capacity: int = 1000):
        self.engine, self.stats, self.capacity = FakeEngine(parts=shapes.parts), Stats(), capacity
        self.seen: list[tuple[str, float]] = []
        runner = Runner(None, shapes, self.engine)
        self.seconds = runner.warm_up()
        self.engine.log.clear()
        self.scheduler = Scheduler(runner, self.stats, self._observe)

    def _observe(self, name: str, value: float) -> None:
        self.seen.append((name, value))
        if name == "total_s":  # before anybody can know that the request has ended
            assert self.stats.running or not self.stats.slots_used

    def admit(self, request: Request) -> Handle:
        handle = Handle(request, self.capacity, lambda handle: None)
        self.scheduler.admit(handle)
        return handle

    def run(self, turns: int = 500) -> None:
        for _ in range(turns):
            if self.scheduler.is_idle:
                return
            self.scheduler.turn()
        assert turns < 500, "it never ends"

    def work(self, word: str = "") -> list[str]:
        """The programs that were dispatched, without their numbers."""
        return [line.rsplit(" ", 1)[0] for line in self.engine.log if line.startswith(word) and "read" not in line]


def tokens_of(events) -> list:
    return [token for event in events if isinstance(event, Tokens) for token in event.tokens]


def check(handle: Handle, cached: int | None = None) -> None:
    """The events of a handle that has ended are those that its request must get, in their order."""
    events, request = list(handle), handle.request
    scores, reason = continued(request.ids, request.settings, request.place)
    assert isinstance(events[0], Started) and events[0].seed == request.settings.seed
    assert cached is None or events[0].cached_tokens == cached
    if request.top_log_probs is None:
        assert tokens_of(events) == [score.id for score in scores]
    else:
        assert tokens_of(events) == [score._replace(top=score.top[: request.top_log_probs]) for score in scores]
    assert isinstance(events[-1], Ended) and events[-1].reason == reason
    n = request.prompt_log_probs
    if n is not None:
        ids = request.ids
        expected = [prompt_score(ids[:i], ids[i]) for i in range(1, len(ids))]
        assert events[1] == PromptScored([None, *(score._replace(top=score.top[:n]) for score in expected)])
    assert all(isinstance(event, Tokens) for event in events[2 if n is not None else 1 : -1])


# ---------------------------------------------------------------------------------------------------------- one request


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 50])
def test_a_request_alone(length):
    bench = Bench()
    handle = bench.admit(request(prompt(length), seed=3, place=2))
    bench.run()
    check(handle, cached=0)
    assert bench.stats.prompt_tokens == length and bench.stats.generated_tokens == 6
    assert bench.stats.requests == Counter(length=1) and bench.stats.running == 0
    assert len(bench.work("extend")) == -(-length // 8)
    names = [name for name, _ in bench.seen]
    assert names.count("queue_s") == names.count("first_token_s") == names.count("total_s") == 1
    assert ("prompt_tokens", length) in bench.seen and ("generated_tokens", 6) in bench.seen


def test_an_eos_ends_a_request_and_is_its_last_token():
    scores, _ = continued(prompt(5), Settings(max_new_tokens=20, eos_token_id=()))
    bench = Bench()
    handle = bench.admit(request(prompt(5), 20, eos=[scores[6].id]))
    bench.run()
    check(handle)
    assert bench.stats.requests == Counter(eos=1) and bench.stats.generated_tokens <= 7


def test_nothing_is_dispatched_that_no_row_can_use():
    """1 token comes with the prompt, 4 with the first decoding, 1 is left for the second."""
    bench = Bench()
    bench.admit(request(prompt(5), 6))
    bench.run()
    assert bench.work() == ["extend 0@0", "decode 4:x...", "decode 1:x..."]
    bench = Bench()
    bench.admit(request(prompt(5), 1))
    bench.run()
    assert bench.work() == ["extend 0@0"]


def test_results_are_read_one_dispatch_behind():
    bench = Bench()
    bench.admit(request(prompt(12), 11))
    bench.run()
    log = list(dict.fromkeys(bench.engine.log))
    programs = [line for line in bench.engine.log if "read" not in line]
    # warm-up was five programs
    assert [p.split()[0] for p in programs] == ["extend", "extend", "decode", "decode", "decode"]
    first_read = {p: log.index(f"read {p}") for p in programs if f"read {p}" in log}
    dispatched = {p: log.index(p) for p in programs}
    ends = [programs[1], programs[2], programs[3], programs[4]]  # the first extend has nothing to read of
    assert dispatched[ends[2]] < first_read[ends[0]] < first_read[ends[1]], log
    assert first_read[ends[1]] < dispatched[ends[3]] < first_read[ends[2]]


def test_few_steps_while_a_prompt_is_read():
    bench = Bench()
    bench.admit(request(prompt(3), 30))
    bench.scheduler.turn()
    bench.admit(request(prompt(30, 1), 2))
    bench.run()
    assert bench.work()[:12] == [
        "extend 0@0", "decode 4:x...", "extend 1@0", "decode 1:x...", "extend 1@8", "decode 1:x...", "extend 1@16",
        "decode 1:x...", "extend 1@24", "decode 4:xx..", "decode 4:xx..", "decode 4:x...",
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- many requests


def test_prompts_take_turns():
    """A long prompt does not keep a short one waiting."""
    bench = Bench()
    long, short = bench.admit(request(prompt(40))), bench.admit(request(prompt(9, 1)))
    bench.run()
    assert bench.work("extend")[:5] == ["extend 0@0", "extend 1@0", "extend 0@8", "extend 1@8", "extend 0@16"]
    check(long, 0)
    check(short, 0)


def test_parts_read_prompts_at_the_same_time():
    bench = Bench(Shapes(rows=4, slots=64, chunk=8, parts=2))
    handles = [bench.admit(request(prompt(20, i))) for i in range(4)]
    bench.run()
    assert bench.work("extend")[0] == "extend 0@0+2@0"
    for handle in handles:
        check(handle)


def test_several_places_of_a_part():
    shapes = Shapes(rows=6, slots=64, chunk=8, parts=1, places=2)
    bench = Bench(shapes)
    handles = [bench.admit(request(prompt(20, i % 2), seed=i)) for i in range(6)]
    bench.run()
    assert bench.work("extend")[0] == "extend 0@0+1@0"
    for handle in handles:
        check(handle)


def test_rows_are_used_again():
    bench = Bench()
    for wave in range(3):
        handles = [bench.admit(request(prompt(10 + i, wave * 4 + i), 3 + i, seed=i)) for i in range(4)]
        assert bench.scheduler.free_rows == 0 and bench.stats.running == 4
        bench.run()
        assert bench.scheduler.free_rows == 4
        for handle in handles:
            check(handle, 0)


def test_log_probs_of_new_tokens_and_of_the_prompt():
    bench = Bench()
    handles = [
        bench.admit(request(prompt(20), 9, top_log_probs=3, prompt_log_probs=2)),
        bench.admit(request(prompt(16), 5, prompt_log_probs=0)),
        bench.admit(request(prompt(1), 1, top_log_probs=20, prompt_log_probs=5)),
        bench.admit(request(prompt(9), 4, top_log_probs=0)),
    ]
    bench.run()
    for handle in handles:
        check(handle)


# ------------------------------------------------------------------------------------------------------------- prefixes


def test_the_same_prompt_again_computes_only_its_last_chunk():
    bench = Bench()
    first = bench.admit(request(prompt(20)))
    bench.run()
    check(first, 0)
    again = bench.admit(request(prompt(20), seed=5))
    bench.run()
    check(again, 16)
    assert bench.work("copy") == [], "the row that holds it is free"
    assert bench.stats.cached_tokens == 16


@pytest.mark.parametrize(("length", "cached"), [(8, 0), (16, 8), (17, 16)])
def test_the_last_chunk_is_always_computed(length, cached):
    bench = Bench()
    for expected in (0, cached):
        handle = bench.admit(request(prompt(length)))
        bench.run()
        check(handle, expected)


def test_a_busy_row_is_copied_from():
    bench = Bench()
    first = bench.admit(request(prompt(30), 30))
    for _ in range(6):
        bench.scheduler.turn()
    second = bench.admit(request([*prompt(20), 5, 5, 5], seed=1))
    bench.run()
    check(first, 0)
    check(second, 16)
    assert bench.work("copy") == ["copy 0>1x2"]


def test_choices_of_one_prompt_share_its_chunks():
    """All are admitted at once: each chunk is computed once, but for the last."""
    bench = Bench()
    handles = [bench.admit(request(prompt(36), seed=4, place=place)) for place in range(4)]
    bench.run()
    for handle in handles:
        check(handle)
    assert len(bench.work("extend")) == 4 + 4
    assert bench.stats.cached_tokens == 3 * 32


def test_prefixes_stay_in_their_part_and_with_their_owner():
    bench = Bench(Shapes(rows=4, slots=64, chunk=8, parts=2))
    handles = [bench.admit(request(prompt(20), owner=owner)) for owner in "aabb"]
    bench.run()
    for handle in handles:
        check(handle)
    again = [bench.admit(request(prompt(20), owner=owner)) for owner in "ac"]
    bench.run()
    check(again[0], 16)
    check(again[1], 0)


def test_scored_prompts_are_computed_whole_but_may_be_copied_from():
    bench = Bench()
    handles = []
    for n in (0, None, 0):
        handles.append(bench.admit(request(prompt(20), prompt_log_probs=n)))
        bench.run()
    for handle, cached in zip(handles, (0, 16, 0), strict=True):
        check(handle, cached)


def test_what_a_row_held_is_forgotten_when_another_takes_it():
    bench = Bench(Shapes(rows=1, slots=64, chunk=8))
    for salt, cached in ((0, 0), (1, 0), (0, 0), (0, 16)):
        handle = bench.admit(request(prompt(20, salt)))
        bench.run()
        check(handle, cached)


# ----------------------------------------------------------------------------------------------------------- early ends


@pytest.mark.parametrize("turns", range(1, 7))
def test_a_cancelled_request_gives_back_its_row_at_once(turns):
    """Also while its tokens are on their way: the next request in the row gets none of them."""
    bench = Bench(Shapes(rows=1, slots=64, chunk=8))
    first = bench.admit(request(prompt(12), 40))
    for _ in range(turns):
        bench.scheduler.turn()
    assert bench.scheduler.end(first, Ended("cancelled"))
    assert not bench.scheduler.end(first, Ended("cancelled"))
    assert bench.scheduler.free_rows == 1
    second = bench.admit(request(prompt(5, 1), 9, seed=8))
    bench.run()
    check(second, 0)
    events = list(first)
    assert events[-1] == Ended("cancelled")
    expected, _ = continued(first.request.ids, first.request.settings)
    got = tokens_of(events)
    assert got == [score.id for score in expected[: len(got)]]
    assert bench.stats.generated_tokens == len(got) + 9, "what came late was dropped"
    assert bench.stats.requests == Counter(cancelled=1, length=1)


def test_a_cancelled_row_does_not_decode():
    bench = Bench()
    first, second = bench.admit(request(prompt(3), 40)), bench.admit(request(prompt(3, 1), 20))
    for _ in range(3):
        bench.scheduler.turn()
    bench.scheduler.end(first, Ended("cancelled"))
    bench.scheduler.turn()
    assert bench.work("decode")[-1] == "decode 4:.x.."
    bench.run()
    check(second)


def test_a_reader_that_does_not_read_loses_its_request_and_no_other():
    bench = Bench(capacity=3)
    slow = bench.admit(request(prompt(3), 40))
    bench.capacity = 1000
    other = bench.admit(request(prompt(3, 1), 40))
    bench.run()
    events = list(slow)
    assert len(events) == 4 and events[-1] == Ended("cancelled")
    check(other)


def test_a_failed_request_is_counted():
    bench = Bench()
    handle = bench.admit(request(prompt(3), 40))
    bench.scheduler.turn()
    bench.scheduler.end(handle, Failed("too slow", 504))
    bench.run()
    assert list(handle)[-1] == Failed("too slow", 504) and bench.stats.requests == Counter(failed=1)


# ----------------------------------------------------------------------------------------------------------- everything

one = st.tuples(
    st.integers(0, 2), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2), st.integers(0, 1),
    st.sampled_from([None, 0, 2]), st.sampled_from([None, None, 1]), st.sampled_from(["", "a"]),
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(
    st.lists(st.one_of(one, st.integers(1, 4), st.tuples(st.just("cancel"), st.integers(0, 30))), max_size=25),
    st.sampled_from([SHAPES, Shapes(4, 64, 8, parts=2, trained=20), Shapes(2, 64, 8, steps=8, prefill_steps=2)]),
)
def test_any_order_of_arrivals_and_cancels_gives_each_request_its_own_tokens(actions, shapes):
    bench, handles, cancelled = Bench(shapes), [], set()
    for action in actions:
        if isinstance(action, int):
            for _ in range(action):
                bench.scheduler.turn()
        elif action[0] == "cancel":
            if action[1] < len(handles) and bench.scheduler.end(handles[action[1]], Ended("cancelled")):
                cancelled.add(handles[action[1]])
        else:
            salt, length, new, seed, place, top, scored, owner = action
            while not bench.scheduler.free_rows:
                bench.scheduler.turn()
            eos = [11, 12, 13, 14, 15, 16]
            handles.append(
                bench.admit(
                    request(
                        prompt(length, salt),
                        new,
                        eos=eos,
                        seed=seed,
                        place=place,
                        top_log_probs=top,
                        prompt_log_probs=scored,
                        owner=owner,
                    )  # fmt: skip
                )
            )
    bench.run()
    for handle in handles:
        if handle not in cancelled:
            check(handle)
    assert bench.scheduler.free_rows == shapes.rows and bench.stats.slots_used == 0


def test_warm_up_runs_every_program_once():
    assert list(Bench().seconds) == ["allocate", "copy_slots", "extend", "score_chunk", "decode"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rows=3, parts=2), "rows = 3 is not valid: it must be a multiple of the 2 parts"),
        (dict(chunk=24), "slots = 64 is not valid: it must be a multiple of chunk = 24"),
        (dict(steps=9), "steps = 9 is not valid: it must be in 1..8"),
        (dict(places=4), "places = 4 is not valid: it must be less than the rows of a part, or 1"),
        (dict(rows=0), "rows = 0 is not valid: it must be at least 1"),
    ],
)
def test_shapes_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**(dict(rows=4, slots=64, chunk=8) | change))
