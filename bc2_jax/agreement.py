"""How the processes of a run agree on a decision; all processes call each function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MOST_BYTES = 2048


def first_decides(decide: Callable[[], Any]) -> Any:
    """The result of `decide` on process 0, a JSON value, returned on every process.

    A ValueError or OSError on process 0 is raised on every process.
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


def require_agreement(facts: dict[str, Any]) -> None:
    """Raises ValueError on every process if a fact (name -> JSON value) differs between processes.

    Nested dicts are compared field by field. The message shows the first differing facts with both values.
    """
    mine = {name: json.dumps(value, sort_keys=True) for name, value in flatten(facts)}
    first = first_decides(lambda: mine)
    names = [name for name in sorted(mine | first) if mine.get(name) != first.get(name)]
    me, unset = f"process {jax.process_index()}", "not set"
    differing = "; ".join(
        f"{name} is {mine.get(name, unset)} on {me} and {first.get(name, unset)} on process 0" for name in names[:3]
    )
    more = f"; {len(names) - 3} more differ" if len(names) > 3 else ""
    problem = (
        f"The processes of the run disagree: {differing}{more}; start all of them with the same command, code and data."
    )
    if problem := any_text(problem if names else ""):
        raise ValueError(problem)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every value in nested dicts and lists of dicts; an empty dict counts as a value."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def any_text(text: str) -> str:
    """The first non-empty text among those of all processes, cut after 2 kB; '' if all are empty."""
    if jax.process_count() == 1:
        return text
    padded = np.zeros(_MOST_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_MOST_BYTES], np.uint8)
    padded[: len(encoded)] = encoded
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(padded))
    return next(filter(None, texts), "")
