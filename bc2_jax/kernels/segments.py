"""What a segment id says: which document of its row a token is in, and which branch of that document.

The documents of a row are segments 1, 2, ...; 0 is padding. Where a document has several ways to go on, such as a
prompt with two answers, its beginning is there once, as the trunk: segment n. Its k-th branch, k = 1, 2, ..., is
segment n + (k << TRUNK_BITS), and its positions go on from the length of the trunk. A token sees earlier tokens of its
own segment and of its trunk: so each branch has what it would have if trunk and branch stood alone.
"""

from __future__ import annotations

from typing import Any

TRUNK_BITS = 24
"""Of a segment id, the lowest bits: the number of the document. Above them is that of the branch, 0 for the trunk."""


def trunk_of(segment_ids: Any) -> Any:
    """The segment of each token's trunk, int32 of any shape: its own where it is in no branch."""
    return segment_ids & ((1 << TRUNK_BITS) - 1)


def branch_of(segment_ids: Any) -> Any:
    """The branch that each token is in, int32 of any shape: 0 in the trunk, branches count from 1."""
    return segment_ids >> TRUNK_BITS


def can_see(query_segments: Any, key_segments: Any) -> Any:
    """Whether a token of one segment sees earlier ones of another: its own or its trunk's; bool, shapes broadcast."""
    same = (key_segments == query_segments) | (key_segments == trunk_of(query_segments))
    return same & (key_segments != 0)
