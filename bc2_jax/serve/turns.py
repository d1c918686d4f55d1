"""One turn of the engine as host arrays, and the runner that dispatches it to the device."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bc2_jax.infer import engine as device_engine
from bc2_jax.infer.decoding import STEPS, Chunk, Emitted, LogProbs
from bc2_jax.infer.settings import DEFAULT_SETTINGS, Sampling, sampling_of
from bc2_jax.serve.requests import Request
from bc2_jax.validation import require


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of the compiled programs."""

    rows: int  # B, requests that are decoded together
    slots: int  # S, most tokens of a request, prompt plus new ones
    chunk: int = 256  # C, prompt tokens per turn
    parts: int = 1  # number of batch shards of the mesh
    places: int = 1  # prompts per shard of which a turn runs a chunk
    steps: int = 4  # decoding steps per turn while no prompt is being read
    prefill_steps: int = 1  # decoding steps per turn while a prompt is being read
    trained: int | None = None
    """For a model with a long context, its trained length, beyond which positions are stretched; else None."""

    def __post_init__(self) -> None:
        for name in ("rows", "slots", "chunk", "parts", "places"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        require(self.rows % self.parts == 0, "rows", self.rows, f"it must be a multiple of the {self.parts} parts")
        require(self.slots % self.chunk == 0, "slots", self.slots, f"it must be a multiple of chunk = {self.chunk}")
        own, legal = self.rows // self.parts, "it must be less than the rows of a part, or 1"
        require(self.places == 1 or self.places < own, "places", self.places, legal)
        for name in ("steps", "prefill_steps"):
            value = getattr(self, name)
            require(1 <= value <= STEPS, name, value, f"it must be in 1..{STEPS}")


def places_for(heads: int) -> int:
    """`Shapes.places` for this many attention heads per device.

    On a CPU the attention of one chunk and one head is a single matmul, which has other bits than one of several.
    """
    return 1 if heads > 1 else device_engine.least_rows()


class Kind(enum.IntEnum):
    """Purpose of a turn."""

    RUN = 0
    IDLE = 1
    STOP = 2


class Turn(NamedTuple):
    """Work of every process in one turn, in this order: copies, a chunk of prompts, its scores, decoding.

    Host arrays of fixed shapes; R = places * parts.
    """

    kind: np.ndarray  # int32 `Kind`
    copy_from_R: np.ndarray  # int32: row whose first slots are copied to the row of this place's chunk
    copy_chunks_R: np.ndarray  # int32: chunks of slots to copy; 0 for none
    chunk: Chunk
    sampling: Sampling  # R rows
    labels_RC: np.ndarray  # int32: the token after each token of the chunk if it is to be scored, else -1
    steps: np.ndarray  # int32: decoding steps; 0 for none
    cancel_B: np.ndarray  # bool: rows that must not decode


class Results(NamedTuple):
    """Results of a turn, still being copied to the host; None for a program that did not run."""

    first: Emitted | None
    scores: LogProbs | None  # `LogProbs` [R, C] of the labels
    new: Emitted | None


def empty_turn(shapes: Shapes, kind: Kind = Kind.RUN, requests: Sequence[Request | None] = ()) -> Turn:
    """A turn without work; its R places have the settings of these requests."""
    R, C, B = shapes.places * shapes.parts, shapes.chunk, shapes.rows
    requests = requests or [None] * R

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    rows_R = np.arange(R, dtype=np.int32) // shapes.places * (B // shapes.parts)  # any row of the part
    chunk = Chunk(
        ids_RC=zeros(R, C), rows_R=rows_R, start_R=zeros(R), count_R=zeros(R), is_last_R=np.zeros(R, bool),
        prompt_RS=np.full((R, shapes.slots), -1, np.int32),
        stretch_R=None if shapes.trained is None else np.ones(R, np.float32),
    )  # fmt: skip
    return Turn(
        kind=np.array(kind, np.int32), copy_from_R=rows_R.copy(), copy_chunks_R=zeros(R), chunk=chunk,
        sampling=_sampling_of_all(requests), labels_RC=np.full((R, C), -1, np.int32), steps=np.array(0, np.int32),
        cancel_B=np.ones(B, bool),
    )  # fmt: skip


def _sampling_of_all(requests: Sequence[Request | None]) -> Sampling:
    """Their settings as arrays, with every array that any request can have."""
    no_eos = dataclasses.replace(DEFAULT_SETTINGS, eos_token_id=())
    return sampling_of(
        [no_eos if request is None else request.settings for request in requests],
        [0 if request is None else request.place for request in requests],
        top_log_probs=[None if request is None else request.top_log_probs for request in requests],
        full=True,
    )


class Runner:
    """Runs turns on the devices of this process and holds the state of the rows.

    `engine` has the functions of `bc2_jax.infer.engine`.
    """

    def __init__(self, prepared: Any, shapes: Shapes, engine: Any = device_engine):
        self._prepared, self._engine = prepared, engine
        self.shapes = shapes
        self._decoding: Any = None

    def warm_up(self) -> dict[str, float]:
        """Allocates the cache and runs each program once without work; returns {program: seconds}."""
        seconds: dict[str, float] = {}
        shapes, engine, prepared = self.shapes, self._engine, self._prepared
        turn = empty_turn(shapes)
        rows = _sampling_of_all([None] * shapes.rows)

        def timed(name: str, run: Any) -> Any:
            start = time.monotonic()
            result = jax.block_until_ready(run())
            seconds[name] = round(time.monotonic() - start, 3)
            return result

        state = timed("allocate", lambda: engine.allocate(prepared, rows, slots=shapes.slots))
        state = timed("copy_slots", lambda: engine.copy_slots(state, 0, 0, 0, shapes.chunk))
        state, _, h_RCD = timed("extend", lambda: engine.extend(prepared, state, turn.chunk, turn.sampling))
        timed("score_chunk", lambda: engine.score_chunk(prepared, h_RCD, np.maximum(turn.labels_RC, 0)))
        state, _ = timed("decode", lambda: engine.decode(prepared, state, 1, turn.cancel_B))
        self._decoding = state
        return seconds

    def run(self, turn: Turn) -> Results:
        """Dispatches a turn without waiting for it."""
        engine, prepared, chunk, C = self._engine, self._prepared, turn.chunk, self.shapes.chunk
        first = scores = new = None
        for row_from, row_to, chunks in zip(turn.copy_from_R, chunk.rows_R, turn.copy_chunks_R, strict=True):
            if chunks:
                self._decoding = engine.copy_slots(self._decoding, int(row_from), int(row_to), int(chunks), C)
        if chunk.count_R.any():
            self._decoding, first, h_RCD = engine.extend(prepared, self._decoding, chunk, turn.sampling)
            if (turn.labels_RC >= 0).any():
                scores = engine.score_chunk(prepared, h_RCD, np.maximum(turn.labels_RC, 0))
        if turn.steps:
            self._decoding, new = engine.decode(prepared, self._decoding, int(turn.steps), turn.cancel_B)
        results = Results(first, scores, new)
        for x in jax.tree.leaves(results):
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
        return results
