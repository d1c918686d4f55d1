"""Segment ids: which document of its row a token is in, and which branch of that document.

The documents of a row are segments 1, 2, ...; 0 is padding. A document with several continuations, such as a prompt
with two answers, stores its beginning once, as the trunk: segment n. Its k-th branch, k = 1, 2, ..., is segment n + (k
<< TRUNK_BITS), with positions counted from the length of the trunk. A token sees earlier tokens of its own segment and
of its trunk, as if trunk and branch stood alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

TRUNK_BITS = 24
"""The lowest bits of a segment id are the number of the document; above them is the branch, 0 for the trunk."""


def trunk_of(segment_ids: Any) -> Any:
    """The segment of each token's trunk, int32 of any shape; outside of branches its own."""
    return segment_ids & ((1 << TRUNK_BITS) - 1)


def branch_of(segment_ids: Any) -> Any:
    """The branch of each token, int32 of any shape: 0 in the trunk, branches count from 1."""
    return segment_ids >> TRUNK_BITS


def can_see(query_segments: Any, key_segments: Any) -> Any:
    """Whether a token of one segment sees earlier ones of another: its own or its trunk; bool, broadcast."""
    same = (key_segments == query_segments) | (key_segments == trunk_of(query_segments))
    return same & (key_segments != 0)


def positions_of(segment_ids_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: positions from the start of each segment, in a branch from the length of its trunk."""
    index = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    previous = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]

    def last(places_BT: jax.Array) -> jax.Array:
        return jax.lax.cummax(jnp.where(places_BT, index, 0), axis=1)

    starts, branch = segment_ids_BT != previous, branch_of(segment_ids_BT)
    is_new = trunk_of(segment_ids_BT) != trunk_of(previous)
    first_branch = starts & (branch > 0) & (is_new | (branch_of(previous) == 0))
    return index - last(starts) + jnp.where(branch > 0, last(first_branch) - last(is_new), 0)
