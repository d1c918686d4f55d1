"""Prompt prefixes held in the rows of the cache, to be copied instead of computed again.

A row holds the complete chunks of its prompt that were prefilled, also after its request ended, until another request
takes the row. A chunk is identified by a hash of itself and all chunks before it, its owner (so that answer times
reveal nothing about other owners' prompts) and the stretch of its positions. Only complete chunks are shared; the same
program computed them at the same positions, so a hit does not change a bit of the result.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np


def hash_chunks(ids: Sequence[int], chunk: int, owner: str, stretch: float = 1.0) -> list[bytes]:
    """One hash per complete chunk of a prompt; `stretch` is that of a long context, on which keys depend."""
    last = hashlib.blake2b(np.float32(stretch).tobytes() + owner.encode(), digest_size=16).digest()
    hashes = []
    for start in range(0, len(ids) - chunk + 1, chunk):
        content = np.asarray(ids[start : start + chunk], np.int32).tobytes()
        last = hashlib.blake2b(last + content, digest_size=16).digest()
        hashes.append(last)
    return hashes


class Prefixes:
    """The chunks held in each of `rows` rows in `parts` batch shards; rows are copied within a shard."""

    def __init__(self, rows: int, parts: int):
        self._rows_of_part = rows // parts
        self._held: list[list[bytes]] = [[] for _ in range(rows)]
        self._holders: dict[tuple[int, bytes], dict[int, None]] = {}

    def part_of(self, row: int) -> int:
        """The batch shard of a row."""
        return row // self._rows_of_part

    def hold(self, row: int, hashes: Sequence[bytes]) -> None:
        """Sets the leading chunks that a row holds."""
        part = self.part_of(row)
        for key in self._held[row]:
            holders = self._holders[part, key]
            del holders[row]
            if not holders:
                del self._holders[part, key]
        self._held[row] = list(hashes)
        for key in hashes:
            self._holders.setdefault((part, key), {})[row] = None

    def count_held(self, row: int, hashes: Sequence[bytes]) -> int:
        """Number of these leading chunks that the row holds."""
        same = 0
        for own, key in zip(self._held[row], hashes, strict=False):
            if own != key:
                break
            same += 1
        return same

    def find(self, part: int, hashes: Sequence[bytes]) -> tuple[int, int]:
        """The row of the shard that holds most of these leading chunks, and how many; any row and 0 if none does."""
        for count in range(len(hashes), 0, -1):
            holders = self._holders.get((part, hashes[count - 1]))
            if holders:
                return next(iter(holders)), count
        return part * self._rows_of_part, 0

    def choose(self, free: Sequence[int], hashes: Sequence[bytes]) -> int:
        """The best free row for a prompt with these chunks, preferring the row that ended longest ago.

        It is one whose shard holds most of the prompt, ideally the row itself; else one in the shard with most free
        rows.
        """
        rows_of_part = Counter(self.part_of(row) for row in free)
        in_part = {part: self.find(part, hashes)[1] for part in rows_of_part}

        def worth(row: int) -> tuple[int, int, int]:
            part = self.part_of(row)
            return in_part[part], self.count_held(row, hashes), rows_of_part[part]

        return max(free, key=worth)  # of equals the first
