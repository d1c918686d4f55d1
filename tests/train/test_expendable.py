from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from bc2_jax.train.expendable import Expendable, Profiler


def fail(expendable: Expendable, error: BaseException) -> None:
    with expendable.attempt("pictures"):
        raise error


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left"), ValueError("a\nb"), KeyError(), MemoryError(), jax.errors.JaxRuntimeError("x")],
)
def test_whatever_fails_is_told_at_powers_of_two_and_counted(error, caplog):
    expendable = Expendable()
    for _ in range(9):
        fail(expendable, error)
    with expendable.attempt("samples"):
        pass
    assert len(caplog.messages) == 4 and all("\n" not in message for message in caplog.messages)
    assert expendable.metrics() == {"failed_pictures": 9.0}
    assert expendable.summary().endswith("(see the log): pictures 9.")
    assert Expendable().summary() == "" and Expendable().metrics() == {}


def test_what_ends_a_run_is_not_caught(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fail(Expendable(), KeyboardInterrupt())
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # another process may be gone
    with pytest.raises(jax.errors.JaxRuntimeError):
        fail(Expendable(), jax.errors.JaxRuntimeError("connection closed by peer"))
    fail(Expendable(), OSError())


def traced(monkeypatch, tmp_path, first: int, count: int, steps: range) -> list[tuple[str, int]]:
    events: list[tuple[str, int]] = []
    now = [0]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(("start", now[0])))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(("stop", now[0])))
    profiler = Profiler(first, count, tmp_path, Expendable())
    for now[0] in steps:
        profiler.before(now[0])
        profiler.after(now[0], jnp.zeros(()))
    profiler.close()
    return events


@pytest.mark.parametrize(
    ("steps", "events"),
    [
        (range(1, 20), [("start", 5), ("stop", 7)]),
        (range(6, 20), [("start", 6), ("stop", 7)]),  # resumed inside
        (range(7, 20), [("start", 7), ("stop", 7)]),
        (range(8, 20), []),
        (range(1, 7), [("start", 5), ("stop", 6)]),  # stopped inside
    ],
)
def test_a_trace_is_of_the_steps_of_the_window_that_are_done(monkeypatch, tmp_path, steps, events, caplog):
    assert traced(monkeypatch, tmp_path, 5, 3, steps) == events
    missed = ["Nothing is profiled: steps 5 to 7 are before step 8."]
    assert caplog.messages == ([] if events else missed)


def test_without_a_first_step_nothing_is_traced(monkeypatch, tmp_path):
    assert traced(monkeypatch, tmp_path, 0, 3, range(5)) == []
