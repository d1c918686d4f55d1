"""The queue of requests that wait for a row: bounded, and fair between owners."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from bc2_jax.serve.requests import Handle
from bc2_jax.validation import require


@dataclasses.dataclass(frozen=True)
class QueueLimits:
    """Limits of the queue."""

    requests: int = 64  # most waiting requests, in addition to free rows
    tokens: int = 262_144  # most tokens of all waiting requests, prompts plus new tokens
    owner_share: float = 0.5  # share of `requests` that one named owner may use
    queue_s: float = 60.0  # most seconds to wait for a row
    total_s: float = 600.0  # most seconds from submission to the last token

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "queue_s", "total_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        require(0 < self.owner_share <= 1, "owner_share", self.owner_share, "it must be in (0, 1]")


class Waiting:
    """The queue. Not thread-safe: its user holds a lock."""

    def __init__(self, limits: QueueLimits):
        self._limits = limits
        self._of_owner: OrderedDict[str, deque[Handle]] = OrderedDict()
        self._count = self._tokens = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Handle]:
        for handles in self._of_owner.values():
            yield from handles

    def why_full(self, handles: Sequence[Handle], free_rows: int) -> str | None:
        """Why these requests cannot be accepted together; None if they can."""
        limits, owner = self._limits, handles[0].request.owner
        if self._count + len(handles) > limits.requests + free_rows:
            return f"{self._count} requests are waiting; at most {limits.requests} may."
        own = len(self._of_owner.get(owner, ()))
        share = max(1, int(limits.requests * limits.owner_share))
        if owner and own + len(handles) > share + free_rows:
            return f"{own} requests of this key are waiting; at most {share} may."
        tokens = self._tokens + sum(handle.request.reserved for handle in handles)
        # One request alone is always accepted, however long.
        if tokens > limits.tokens and self._count + len(handles) > max(1, free_rows):
            return f"The waiting requests would have {tokens} tokens; at most {limits.tokens} may."
        return None

    def put(self, handle: Handle) -> None:
        self._of_owner.setdefault(handle.request.owner, deque()).append(handle)
        self._count += 1
        self._tokens += handle.request.reserved

    def take(self) -> Handle:
        """Removes the oldest request of the owner whose turn it is; the next turn goes to another owner."""
        owner, handles = next(iter(self._of_owner.items()))
        handle = handles[0]
        self.remove(handle)
        if handles:
            self._of_owner.move_to_end(owner)
        return handle

    def place_of(self, handle: Handle) -> int | None:
        """Number of requests that will be taken before this one if no other comes; None if it does not wait."""
        owner = handle.request.owner
        if handle not in self._of_owner.get(owner, ()):
            return None
        own = place = self._of_owner[owner].index(handle)
        is_before = True  # in the rotation
        for other, handles in self._of_owner.items():
            if other == owner:
                is_before = False
            else:
                place += min(len(handles), own + is_before)
        return place

    def remove(self, handle: Handle) -> bool:
        """Removes a request; returns whether it was waiting."""
        owner = handle.request.owner
        handles = self._of_owner.get(owner)
        if handles is None or handle not in handles:
            return False
        handles.remove(handle)
        if not handles:
            del self._of_owner[owner]
        self._count -= 1
        self._tokens -= handle.request.reserved
        return True

    def remove_expired(self, now: float) -> list[Handle]:
        """Removes and returns requests that have waited too long at `now` (`time.monotonic`)."""
        expired = [handle for handle in self if now - handle.submitted > self._limits.queue_s]
        for handle in expired:
            self.remove(handle)
        return expired
