"""Times on a device: compiled and warmed up first, in loops on the device, waited for, the median of repetitions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bc2_jax.sharding import from_host

REPEATS = 5
_MOST_PASSES = 1 << 20


def seconds_per_pass(body: Callable[..., Any], start: Any, *fixed: Any, least: float = 0.3) -> float:
    """Seconds of one pass of `body(x, *fixed) -> x`, which keeps the shape of x.

    Passes follow each other in one program that takes at least `least` seconds, so that the time to start it does not
    count. Each pass needs the result of the one before, so none is left out.
    """

    @jax.jit
    def run(start: Any, count: Any, *fixed: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, x: body(x, *fixed), start)

    def seconds(count: int) -> float:
        given = from_host(np.int32(count))
        begin = time.perf_counter()
        jax.block_until_ready(run(start, given, *fixed))
        return time.perf_counter() - begin

    seconds(1)  # compiles
    count, taken = 1, seconds(1)
    while taken < least and count < _MOST_PASSES:
        count = min(max(2 * count, int(1.2 * count * least / max(taken, 1e-9))), 16 * count, _MOST_PASSES)
        taken = seconds(count)
    return statistics.median([taken, *(seconds(count) for _ in range(REPEATS - 1))]) / count


def seconds_of_calls(call: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Seconds of each of several calls, each waited for, after one that does not count."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - begin)
    return taken
