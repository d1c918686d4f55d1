"""What the processes of a run tell each other, so that all decide the same; all of them call each function."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MOST_BYTES = 2048


def first_decides(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on process 0, a value that JSON can hold, on every process.

    A ValueError or OSError of process 0 is raised on every process.
    """
    if jax.process_count() == 1:
        return decide()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except (ValueError, OSError) as error:
            answer = {"error": str(error), "is_os": isinstance(error, OSError)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, size) if jax.process_index() == 0 else np.zeros(size, np.uint8)
    answer = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8)))
    if "error" in answer:
        raise (OSError if answer["is_os"] else ValueError)(answer["error"])
    return answer["value"]


def any_text(text: str) -> str:
    """The first text among those of the processes that is not empty, cut off after 2 kB; else an empty one."""
    if jax.process_count() == 1:
        return text
    padded = np.zeros(_MOST_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_MOST_BYTES], np.uint8)
    padded[: len(encoded)] = encoded
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(padded))
    return next(filter(None, texts), "")
