"""Which beginnings of prompts the rows of the cache hold, so that they are copied instead of computed again.

A row holds the whole chunks of its prompt that were prefilled, also after its request has ended, until another request
takes the row. A chunk is known by a hash over itself and all chunks before it, over whose it is, since how fast an
answer comes must tell an owner nothing about the prompts of others, and over how far its positions are stretched. Only
whole chunks are shared, and they were computed by the same program at the same place, so a hit changes no bit of the
result.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np


def hash_chunks(ids: Sequence[int], chunk: int, owner: str, stretch: float = 1.0) -> list[bytes]:
    """One hash for each whole chunk of a prompt; `stretch` is that of a long context, on which its keys depend."""
    last = hashlib.blake2b(np.float32(stretch).tobytes() + owner.encode(), digest_size=16).digest()
    hashes = []
    for start in range(0, len(ids) - chunk + 1, chunk):
        content = np.asarray(ids[start : start + chunk], np.int32).tobytes()
        last = hashlib.blake2b(last + content, digest_size=16).digest()
        hashes.append(last)
    return hashes


class Prefixes:
    """What each of `rows` rows holds, which lie in `parts` equal parts of the batch; rows are copied within a part."""

    def __init__(self, rows: int, parts: int):
        self._rows_of_part = rows // parts
        self._held: list[list[bytes]] = [[] for _ in range(rows)]
        self._holders: dict[tuple[int, bytes], dict[int, None]] = {}

    def part_of(self, row: int) -> int:
        """The part in which a row lies."""
        return row // self._rows_of_part

    def hold(self, row: int, hashes: Sequence[bytes]) -> None:
        """From now on the row holds these first chunks and no others."""
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
        """How many of these first chunks the row itself holds."""
        same = 0
        for own, key in zip(self._held[row], hashes, strict=False):
            if own != key:
                break
            same += 1
        return same

    def find(self, part: int, hashes: Sequence[bytes]) -> tuple[int, int]:
        """A row of the part that holds the most of these first chunks, and how many; any row and 0 if none does."""
        for count in range(len(hashes), 0, -1):
            holders = self._holders.get((part, hashes[count - 1]))
            if holders:
                return next(iter(holders)), count
        return part * self._rows_of_part, 0

    def choose(self, free: Sequence[int], hashes: Sequence[bytes]) -> int:
        """The best of the free rows, the one that ended longest ago first, for a prompt with these chunks.

        One whose part holds most of it, best the row itself; else one of the part with the most free rows.
        """
        rows_of_part = Counter(self.part_of(row) for row in free)
        in_part = {part: self.find(part, hashes)[1] for part in rows_of_part}

        def worth(row: int) -> tuple[int, int, int]:
            part = self.part_of(row)
            return in_part[part], self.count_held(row, hashes), rows_of_part[part]

        return max(free, key=worth)  # of equals the first
