"""Cutting prompts into chunks: put together again they are the prompts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.infer.decoding import PlacedPrompt, make_chunk

PROMPTS = st.lists(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=4)


@given(PROMPTS, st.integers(1, 8))
def test_chunks_are_the_prompts(prompts, size):
    placed = [None if ids is None else PlacedPrompt(7 - i, ids) for i, ids in enumerate(prompts)]
    whole, ends = [[] for _ in prompts], [0] * len(prompts)
    for start in range(0, 24, size):
        chunk = make_chunk(placed, start, size, slots=24)
        assert chunk.ids_RC.shape == (len(prompts), size) and chunk.start_R.tolist() == [start] * len(prompts)
        for i, at in enumerate(placed):
            assert chunk.rows_R[i] == (0 if at is None else at.row)
            whole[i] += chunk.ids_RC[i, : chunk.count_R[i]].tolist()
            ends[i] += chunk.is_last_R[i]
            # The whole prompt comes with its last chunk.
            expected = [-1] * 24 if at is None or not chunk.is_last_R[i] else [*at.ids, *[-1] * (24 - len(at.ids))]
            assert chunk.prompt_RS[i].tolist() == expected
            assert chunk.is_last_R[i] <= (chunk.count_R[i] > 0)
    assert whole == [ids or [] for ids in prompts]
    assert ends == [int(ids is not None) for ids in prompts]


def test_each_place_may_have_a_start_of_its_own():
    placed = [PlacedPrompt(2, [1, 2, 3, 4, 5]), None, PlacedPrompt(0, np.array([6, 7]))]
    chunk = make_chunk(placed, [4, 0, 0], size=2, slots=8)
    assert chunk.ids_RC.tolist() == [[5, 0], [0, 0], [6, 7]]
    assert chunk.start_R.tolist() == [4, 0, 0] and chunk.count_R.tolist() == [1, 0, 2]
    assert chunk.is_last_R.tolist() == [True, False, True]
