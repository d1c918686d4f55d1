"""Cutting prompts into chunks on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.infer.decoding import Chunk


class PlacedPrompt(NamedTuple):
    """A prompt and the row of the batch that it belongs to."""

    row: int
    ids: Sequence[int]


def make_chunk(
    placed: Sequence[PlacedPrompt | None], starts: int | Sequence[int], size: int, slots: int,
    stretches: Sequence[float] | None = None,
) -> Chunk:  # fmt: skip
    """The `size` tokens from `starts` on, one place or one for each prompt, of prompts in a cache of `slots` slots.

    None is a place without a prompt; one that has ended before `starts` has nothing to do. `stretches` are those of
    the prompts (`Prepared.stretch`), needed for a model with a long context.
    """
    R = len(placed)
    start_R = np.broadcast_to(np.asarray(starts, np.int32), R).copy()
    chunk = Chunk(
        ids_RC=np.zeros((R, size), np.int32), rows_R=np.zeros(R, np.int32), start_R=start_R,
        count_R=np.zeros(R, np.int32), is_last_R=np.zeros(R, bool), prompt_RS=np.full((R, slots), -1, np.int32),
        stretch_R=None if stretches is None else np.asarray(stretches, np.float32),
    )  # fmt: skip
    for place, prompt in enumerate(placed):
        if prompt is None:
            continue
        chunk.rows_R[place] = prompt.row
        start = int(start_R[place])
        ids = prompt.ids[start : start + size]
        chunk.ids_RC[place, : len(ids)], chunk.count_R[place] = ids, len(ids)
        if len(ids) > 0 and start + size >= len(prompt.ids):
            chunk.is_last_R[place] = True
            chunk.prompt_RS[place, : len(prompt.ids)] = prompt.ids
    return chunk
