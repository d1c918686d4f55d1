"""The handle between the engine thread and a reader."""

from __future__ import annotations

import asyncio
import threading

from bc2_jax.infer.settings import Settings
from bc2_jax.serve.requests import Ended, Handle, Request, Started, Tokens

REQUEST = Request((1, 2, 3), Settings(max_new_tokens=5, eos_token_id=()))
EVENTS = [Started(0, 0), Tokens([1]), Tokens([2, 3]), Ended("length")]


def handle(capacity: int = 10, on_cancel=lambda handle: None) -> Handle:
    return Handle(REQUEST, capacity, on_cancel)


def test_events_come_in_their_order_and_end():
    one = handle()
    assert all(one.put(event) for event in EVENTS) and one.is_complete
    assert list(one) == EVENTS


def test_a_reader_in_another_thread_waits_for_events():
    one, found = handle(), []
    reader = threading.Thread(target=lambda: found.extend(one))
    reader.start()
    for event in EVENTS:
        one.put(event)
    reader.join(60)
    assert found == EVENTS


def test_a_reader_in_an_event_loop_waits_without_blocking_it():
    """Each event is put only after the loop has done something else while the reader waits for that event."""
    one, ticks, is_free, found = handle(), threading.Semaphore(0), [], []

    def put() -> None:
        for event in EVENTS:
            while ticks.acquire(blocking=False):
                pass
            is_free.append(all(ticks.acquire(timeout=30) for _ in range(3)))
            one.put(event)

    async def tick() -> None:
        while not one.is_complete:
            ticks.release()
            await asyncio.sleep(0.002)

    async def read() -> None:
        ticking = asyncio.create_task(tick())
        writer = threading.Thread(target=put)
        writer.start()
        async for event in one:
            found.append(event)
        await ticking
        writer.join()

    asyncio.run(read())
    assert found == EVENTS and is_free == [True] * len(EVENTS)


def test_an_event_for_a_closed_loop_is_no_error():
    one = handle()

    async def give_up() -> None:
        async def read() -> None:
            async for _ in one:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(give_up())
    assert one.put(EVENTS[0]) and one.put(EVENTS[-1])
    assert list(one) == [EVENTS[0], EVENTS[-1]], "nothing was lost to the reader that was cancelled"


def test_too_many_unread_events_are_refused_but_the_last_is_not():
    one = handle(capacity=2)
    assert [one.put(Tokens([i])) for i in range(3)] == [True, True, False]
    assert one.put(Ended("cancelled"))
    assert list(one) == [Tokens([0]), Tokens([1]), Ended("cancelled")]


def test_nothing_comes_after_the_last_event():
    cancelled = []
    one = handle(on_cancel=cancelled.append)
    one.cancel()
    one.put(EVENTS[-1])
    one.cancel()
    assert one.put(Tokens([9])) and list(one) == [EVENTS[-1]]
    assert cancelled == [one]


def test_what_a_request_reserves():
    assert REQUEST.reserved == 8
