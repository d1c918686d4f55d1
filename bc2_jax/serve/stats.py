"""What a service counts and measures, for metrics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Literal

from bc2_jax.serve.requests import Ended, Failed

Observation = Literal[
    "queue_s", "first_token_s", "token_s", "total_s", "prompt_tokens", "generated_tokens", "step_s", "host_s"
]
"""What is measured of each request, when it ends or as soon as it is known: seconds from submission to a row, to the
first token and to the last; seconds between tokens (the mean over those that came together); its tokens. And of each
turn: seconds a decoding step, from one turn's results to the next; seconds of the host between reading a turn's results
and having dispatched the turn after the next, for which the device waits only if a turn takes less."""
Observe = Callable[[Observation, float], None]


@dataclasses.dataclass
class Stats:
    """Counters since the start, written by the engine thread, and gauges of now; read them from any thread."""

    requests: Counter[str] = dataclasses.field(default_factory=Counter)
    """By outcome: eos, length, cancelled, failed."""
    rejected: int = 0
    """Requests for which the queue was full."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that another request had computed."""
    compilations: int = 0
    """By the engine thread after the start; anything but 0 is a fault."""
    waiting: int = 0
    running: int = 0
    """Requests that have a row."""
    rows: int = 0
    slots: int = 0
    """Of all rows."""
    slots_used: int = 0
    """By tokens of the requests that have a row."""

    def count(self, event: Ended | Failed) -> None:
        """A request has ended so."""
        self.requests[event.reason if isinstance(event, Ended) else "failed"] += 1
