"""Tiny models laid out for decoding, and a batch on the engine that a test drives step by step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.convert.hf_config import read_config
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import Emitted, PlacedPrompt, Reason, make_chunk
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.settings import Settings, sampling_of
from bc2_jax.model.baichuan import Baichuan2, param_shardings, split_model
from bc2_jax.sharding import Mesh, parts, to_host, use_mesh_of
from tests.convert.models import GOLDEN, read_params

GREEDY = dict(temperature=0.0, repetition_penalty=1.0)
SMALL = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="rope",
    vocab_size=512, model_max_length=128,
)  # fmt: skip
"""For what does not depend on the architecture."""


def small_model(mesh: Mesh | None = None, dtype: str = "float32") -> Baichuan2:
    graphdef, state = nnx.split(Baichuan2(SMALL, ComputeConfig(dtype=dtype), rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    return nnx.merge(graphdef, jax.device_put(params, None if mesh is None else param_shardings(SMALL, mesh)))


def golden_model(name: str, mesh: Mesh | None = None, dtype: str = "float32") -> Baichuan2:
    """One of tests/golden, whose continuations in PyTorch are known."""
    # They were not trained: any number of tokens is as good as theirs.
    config = dataclasses.replace(read_config(GOLDEN / name), model_max_length=512)
    shardings = None if mesh is None else param_shardings(config, mesh)
    params = jax.device_put(read_params(GOLDEN / name, config), shardings)
    return nnx.merge(split_model(config, ComputeConfig(dtype=dtype))[0], params)


@functools.cache
def prepared_golden(name: str, mesh: Mesh | None = None, dtype: str = "float32", kv="compute") -> Prepared:
    return engine.prepare(golden_model(name, mesh, dtype), kv=kv)


@functools.cache
def prepared_small() -> Prepared:
    return engine.prepare(small_model())


class Prompt(NamedTuple):
    """What a row is to continue."""

    ids: list[int]
    settings: Settings = Settings(max_new_tokens=40, eos_token_id=(), **GREEDY)
    place: int = 0


class Score(NamedTuple):
    """A token that was chosen, and what is told of it."""

    token: int
    log_prob: float
    top: list[tuple[int, float]]


class Batch:
    """Rows of a cache, and what each has been given since its prompt ended."""

    def __init__(self, prepared: Prepared, *, rows: int = 4, places: int = 2, slots: int = 256):
        self.prepared, self.rows, self.places, self.slots = prepared, rows, places, slots
        with use_mesh_of(prepared.params["norm"]["weight"]):
            self._parts = parts("batch")
        self.found: list[list[Score]] = [[] for _ in range(rows)]
        self.reasons = [Reason.NO_PROMPT] * rows
        nothing = [Settings().check(prepared.config)] * rows
        self.decoding = engine.allocate(prepared, sampling_of(nothing, range(rows), full=True), slots=slots)

    def extend(self, start: int | Mapping[int, int], prompts: Mapping[int, Prompt]) -> jax.Array:
        """A chunk, from `start` or each row's own, of the prompts of these rows; returns the hidden states."""
        per_part, rows_per_part = self.places // self._parts, self.rows // self._parts
        at: dict[int, int] = {}
        for row in prompts:
            part = row // rows_per_part
            free = [i for i in range(part * per_part, (part + 1) * per_part) if i not in at]
            at[row if self.places == self.rows else free[0]] = row
        placed = [PlacedPrompt(at[i], prompts[at[i]].ids) if i in at else None for i in range(self.places)]
        starts = [start if isinstance(start, int) else start.get(at.get(i, -1), 0) for i in range(self.places)]
        chunk = make_chunk(placed, starts, engine.chunk_length(), self.slots)
        of_places = [prompts[at[i]] if i in at else next(iter(prompts.values())) for i in range(self.places)]
        sampling = sampling_of(
            [prompt.settings.check(self.prepared.config) for prompt in of_places],
            [prompt.place for prompt in of_places], top_log_probs=[20] * self.places, full=True,
        )  # fmt: skip
        self.decoding, emitted, h_RCD = engine.extend(self.prepared, self.decoding, chunk, sampling)
        for place, row in at.items():
            self.found[row], self.reasons[row] = [], Reason.NO_PROMPT
            if chunk.is_last_R[place]:
                self._add(emitted, place, row)
        return h_RCD

    def fill(self, prompts: Mapping[int, Prompt], start: int = 0) -> None:
        """All chunks of these prompts, side by side."""
        longest = max(len(prompt.ids) for prompt in prompts.values())
        for at in range(start, longest, engine.chunk_length()):
            self.extend(at, {row: prompt for row, prompt in prompts.items() if len(prompt.ids) > at})

    def decode(self, steps: int = engine.STEPS, cancel: Collection[int] = ()) -> None:
        cancel_B = np.array([row in cancel for row in range(self.rows)])
        self.decoding, emitted = engine.decode(self.prepared, self.decoding, steps, cancel_B)
        for row in range(self.rows):
            self._add(emitted, row, row)

    def copy(self, row_from: int, row_to: int, chunks: int) -> None:
        self.decoding = engine.copy_slots(self.decoding, row_from, row_to, chunks, engine.chunk_length())

    def tokens(self, row: int) -> list[int]:
        return [score.token for score in self.found[row]]

    def _add(self, emitted: Emitted, place: int, row: int) -> None:
        assert emitted.log_probs is not None
        tokens, scores = to_host(emitted.tokens_BK)[place], [to_host(x)[place] for x in emitted.log_probs]
        for token, log_prob, ids, log_probs in zip(tokens.tolist(), *(x.tolist() for x in scores), strict=True):
            if token >= 0:
                self.found[row].append(Score(token, log_prob, list(zip(ids, log_probs, strict=True))))
        self.reasons[row] = Reason(int(to_host(emitted.reason_B)[place]))
