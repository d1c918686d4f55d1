"""The engine thread: acceptance, limits, cancels, ends of all kinds; on the fake engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from bc2_jax.infer.settings import Settings
from bc2_jax.serve.requests import Ended, Failed, NotReady, QueueFull, Request, Started, Tokens
from bc2_jax.serve.service import Service
from bc2_jax.serve.turns import Runner, Shapes
from bc2_jax.serve.waiting import QueueLimits
from tests.serve.fake_engine import FakeEngine, continued

SHAPES = Shapes(rows=2, slots=4096, chunk=8)
PROGRAMS = 5  # of the start


def request(*ids: int, new: int = 6, **more) -> Request:
    return Request(ids or (1, 2, 3), Settings(max_new_tokens=new, eos_token_id=()), **more)


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def tokens(events) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.tokens]


@pytest.fixture
def make():
    """engine, limits -> a service that has started; all are stopped at the end."""
    services = []

    def start(engine: FakeEngine | None = None, limits: QueueLimits | None = None, **more) -> Service:
        service = Service(Runner(None, SHAPES, engine or FakeEngine()), limits, **more)
        services.append(service)
        service.start()
        return service

    yield start
    for service in services:
        service._runner._engine.gate.set()
        assert service.stop(60)


def test_requests_get_their_tokens(make):
    service = make()
    assert service.state == "ready" and list(service.seconds) == [
        "allocate", "copy_slots", "extend", "score_chunk", "decode",
    ]  # fmt: skip
    handles = service.submit_all([request(i, i + 1, new=5 + i) for i in range(7)])
    for handle in handles:
        expected = [score.id for score in continued(handle.request.ids, handle.request.settings)[0]]
        assert tokens(handle) == expected
    stats = service.stats()
    assert stats.requests == Counter(length=7) and stats.rejected == stats.compilations == stats.waiting == 0
    assert (stats.rows, stats.slots, stats.running, stats.prompt_tokens) == (2, 8192, 0, 14)
    assert stats.generated_tokens == sum(range(5, 12))


def test_requests_from_an_event_loop(make):
    service = make()

    async def one(i: int) -> list[int]:
        return tokens([event async for event in service.submit(request(i))])

    async def all_of_them():
        return await asyncio.gather(*(one(i) for i in range(20)))

    expected = [[score.id for score in continued((i,), request().settings)[0]] for i in range(20)]
    assert asyncio.run(all_of_them()) == expected


def test_what_does_not_fit_is_refused(make):
    service = make()
    legal = "prompt and max_new_tokens must fit the 4096 tokens of a row"
    with pytest.raises(ValueError, match=f"prompt and max_new_tokens = 4097 is not valid: {legal}"):
        service.submit(request(1, new=4096))
    with pytest.raises(ValueError, match="ids = .* is not valid: it must be at least 1 id"):
        service.submit(Request((), Settings(eos_token_id=())))
    assert tokens(service.submit(request(1, new=1)))


def test_a_full_queue_refuses_and_says_when_to_come_back(make):
    engine = FakeEngine()
    service = make(engine, QueueLimits(requests=2))
    engine.gate.clear()
    running = service.submit_all([request(new=3) for _ in range(2)])
    wait_for(lambda: service.stats().running == 2)
    waiting = service.submit_all([request(), request()])
    assert service.stats().waiting == 2
    assert [service.queue_place(handle) for handle in waiting + running] == [0, 1, None, None]
    with pytest.raises(QueueFull, match="2 requests are waiting; at most 2 may") as refused:
        service.submit(request())
    assert 1 <= refused.value.retry_after <= 60 and service.stats().rejected == 1
    engine.gate.set()
    for handle in running + waiting:
        assert list(handle)[-1] == Ended("length")


def test_a_row_goes_to_another_owner_before_the_same_again(make):
    engine = FakeEngine()
    service = make(engine)
    engine.gate.clear()
    service.submit_all([request(), request()])
    wait_for(lambda: service.stats().running == 2)
    greedy = service.submit_all([request(5, owner="a", new=1) for _ in range(8)])
    modest = service.submit(request(6, owner="b", new=1))
    engine.gate.set()
    last = list(greedy[-1])
    # It waits for a part of the others only.
    assert modest.is_complete and last[-1] == Ended("length")
    extended = [i for i, line in enumerate(engine.log) if line.startswith("extend")]
    assert len(extended) >= 6


@pytest.mark.parametrize("started", [False, True])
def test_cancel(make, started):
    engine = FakeEngine()
    service = make(engine)
    if not started:
        engine.gate.clear()
        blockers = service.submit_all([request(new=4000), request(new=4000)])
        wait_for(lambda: service.stats().running == 2)
    handle = service.submit(request(new=4000))
    if started:
        events = iter(handle)
        assert isinstance(next(events), Started)
        handle.cancel()
        assert list(events)[-1] == Ended("cancelled")
        wait_for(lambda: service.stats().running == 0)
        assert tokens(service.submit(request()))
    else:
        handle.cancel()
        for blocker in blockers:
            blocker.cancel()
        engine.gate.set()
        assert list(handle) == [Ended("cancelled")]


def test_time_limits(make):
    engine = FakeEngine()
    service = make(engine, QueueLimits(queue_s=0.05, total_s=0.4))
    engine.gate.clear()
    running = service.submit_all([request(new=4000), request(new=4000)])
    wait_for(lambda: service.stats().running == 2)
    late = service.submit(request())
    time.sleep(0.5)
    engine.gate.set()
    assert list(late) == [Failed("No row was free in time.", 503)]
    for handle in running:
        assert list(handle)[-1] == Failed("The request took too long.", 504)
    assert service.stats().requests == Counter(failed=3)


def test_drain_completes_what_was_accepted(make):
    engine = FakeEngine()
    service = make(engine)
    engine.gate.clear()
    handles = service.submit_all([request(i, new=9) for i in range(5)])
    done = []
    drainer = threading.Thread(target=lambda: done.append(service.drain(60)))
    drainer.start()
    wait_for(lambda: service.state == "draining")
    with pytest.raises(NotReady, match="The service is draining") as refused:
        service.submit(request())
    assert refused.value.state == "draining" and not service.is_healthy
    engine.gate.set()
    drainer.join(60)
    assert done == [True] and service.state == "stopped"
    for handle in handles:
        assert list(handle)[-1] == Ended("length")


def test_drain_of_an_idle_service_is_quick(make):
    service = make()
    begin = time.monotonic()
    assert service.drain(60) and service.state == "stopped"
    assert time.monotonic() - begin < 5
    with pytest.raises(NotReady):
        service.submit(request())


def test_stop_ends_every_request(make):
    engine = FakeEngine()
    service = make(engine)
    handles = service.submit_all([request(new=4000) for _ in range(4)])
    wait_for(lambda: service.stats().running == 2)
    assert service.stop(60) and service.state == "stopped"
    for handle in handles:
        assert list(handle)[-1] == Failed("The server stops.", 503)
    stats = service.stats()
    assert (stats.running, stats.waiting, stats.slots_used) == (0, 0, 0)


def test_a_failure_of_the_engine_ends_every_request_and_is_seen(make):
    engine, deaths = FakeEngine(fails_at=PROGRAMS + 7), []
    service = make(engine, on_death=deaths.append)
    handles = service.submit_all([request(new=4000) for _ in range(4)])
    for handle in handles:
        assert list(handle)[-1] == Failed("The engine has failed.", 500)
    wait_for(lambda: deaths)
    assert service.state == "dead" and not service.is_healthy
    assert str(service.error) == "the device is gone" and deaths == [service.error]
    stats = service.stats()
    assert (stats.running, stats.waiting, stats.slots_used) == (0, 0, 0)
    with pytest.raises(NotReady, match="The service is dead"):
        service.submit(request())


def test_a_failure_at_the_start_is_raised():
    service = Service(Runner(None, SHAPES, FakeEngine(fails_at=3)))
    with pytest.raises(NotReady, match="loading"):
        service.submit(request())
    with pytest.raises(RuntimeError, match="The engine could not start: the device is gone"):
        service.start()
    assert service.state == "dead"


def test_the_heart_beats_without_requests_and_not_in_a_dispatch_that_hangs(make):
    engine = FakeEngine()
    service = make(engine, stall_s=1.6)
    time.sleep(1.8)
    wait_for(lambda: service.heartbeat_s < 1.5 and service.is_healthy)  # without beats it would never be
    engine.gate.clear()
    handle = service.submit(request())
    wait_for(lambda: service.is_stalled)
    assert service.heartbeat_s > 1.6 and not service.is_healthy
    engine.gate.set()
    assert list(handle)[-1] == Ended("length")
    wait_for(lambda: service.is_healthy)


def test_an_idle_service_does_not_spin(make):
    make()
    time.sleep(0.2)
    cpu, begin = time.process_time(), time.monotonic()
    time.sleep(1.5)
    assert time.process_time() - cpu < 0.3 * (time.monotonic() - begin)


def test_compilations_of_the_engine_thread_are_counted(make):
    class Compiles(FakeEngine):
        def decode(self, prepared, state, steps, cancel_B):
            if len(self.log) > PROGRAMS:
                jax.jit(lambda x: x + steps)(jnp.ones(3)).block_until_ready()
            return super().decode(prepared, state, steps, cancel_B)

    service = make(Compiles())
    jax.jit(lambda x: x * 3)(jnp.ones(5)).block_until_ready()  # of another thread
    assert service.stats().compilations == 0
    list(service.submit(request(new=3)))
    assert service.stats().compilations >= 1


def test_measurements(make):
    seen = []
    service = make(observe=lambda name, value: seen.append((name, value)))
    list(service.submit(request(new=30)))
    names = Counter(name for name, _ in seen)
    assert set(names) == {
        "queue_s", "first_token_s", "token_s", "total_s", "prompt_tokens", "generated_tokens", "step_s", "host_s",
    }  # fmt: skip
    assert ("prompt_tokens", 3) in seen and ("generated_tokens", 30) in seen
    assert all(value >= 0 for _, value in seen)


def test_no_request_is_lost_between_queue_and_row(make, monkeypatch):
    engine = FakeEngine()
    service = make(engine)
    engine.gate.clear()
    running = service.submit_all([request(), request()])
    wait_for(lambda: service.stats().running == 2)

    def fail(handle) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(service._scheduler, "admit", fail)
    waiting = service.submit_all([request() for _ in range(3)])
    engine.gate.set()
    for handle in running:
        assert list(handle)[-1] in (Ended("length"), Failed("The engine has failed.", 500))
    for handle in waiting:
        assert list(handle) == [Failed("The engine has failed.", 500)]
    assert isinstance(service.error, MemoryError)


def test_a_request_is_counted_as_waiting_until_it_has_a_row(make, monkeypatch):
    service, seen = make(), []
    admit = service._scheduler.admit

    def counted(handle) -> None:
        stats = service.stats()
        seen.append((stats.waiting, stats.running))
        admit(handle)

    monkeypatch.setattr(service._scheduler, "admit", counted)
    for handle in service.submit_all([request(), request()]):
        list(handle)
    assert seen == [(2, 0), (1, 1)]


def test_stopping_in_the_turn_of_a_cancel_loses_no_event(make):
    engine = FakeEngine()
    service = make(engine)
    engine.gate.clear()
    handles = service.submit_all([request() for _ in range(4)])
    wait_for(lambda: service.stats().running == 2)
    stopper = threading.Thread(target=service.stop)
    for handle in handles:
        handle.cancel()
    stopper.start()
    wait_for(lambda: service._is_stopping)
    engine.gate.set()
    stopper.join(60)
    for handle in handles:
        assert list(handle)[-1] in (Ended("cancelled"), Failed("The server stops.", 503))
