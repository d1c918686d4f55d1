"""Counters and measurements of a service."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Literal

from bc2_jax.serve.requests import Ended, Failed

Observation = Literal[
    "queue_s", "first_token_s", "token_s", "total_s", "prompt_tokens", "generated_tokens", "step_s", "host_s"
]
"""Per request, as soon as known: seconds from submission to a row, to the first and to the last token; seconds between
tokens (mean over tokens that arrive together); its tokens. Per turn: seconds per decoding step, between the results of
two turns; host seconds from reading results to the next dispatch, for which the device waits only if a turn is shorter.
"""
Observe = Callable[[Observation, float], None]


@dataclasses.dataclass
class Stats:
    """Counters since the start, written by the engine thread, and current gauges. Readable from any thread."""

    requests: Counter[str] = dataclasses.field(default_factory=Counter)  # by outcome: eos, length, cancelled, failed
    rejected: int = 0  # requests rejected because the queue was full
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the cache
    compilations: int = 0  # compilations in the engine thread after the start; anything but 0 is a bug
    waiting: int = 0
    running: int = 0  # requests that have a row
    rows: int = 0
    slots: int = 0
    slots_used: int = 0  # cache slots used by running requests

    def count(self, event: Ended | Failed) -> None:
        self.requests[event.reason if isinstance(event, Ended) else "failed"] += 1
