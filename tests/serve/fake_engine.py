"""The functions of `bc2_jax.infer.engine` in numpy: the next token is a hash of all ids so far, seed and place.

So a token is right only if the slots of its row hold exactly the ids that they should. What is done is written to
`log`, also when a result is read: results are read later than they are made.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from bc2_jax.infer.decoding import STEPS, Emitted, LogProbs, Reason
from bc2_jax.infer.settings import Settings
from bc2_jax.serve.requests import TokenScore

VOCABULARY = 97
TOP = 20


def score(ids: Sequence[int], seed: int, place: int) -> TokenScore:
    """The token after `ids`, its log-probability and the most likely ones."""
    digest = hashlib.blake2b(repr((list(map(int, ids)), seed, place)).encode(), digest_size=8).digest()
    token = int.from_bytes(digest[:4], "little") % VOCABULARY
    top = tuple(((token + i) % VOCABULARY, -float(i)) for i in range(TOP))
    return TokenScore(token, -digest[4] / 16, top)


def prompt_score(ids: Sequence[int], label: int) -> TokenScore:
    """The log-probability of `label` after `ids`, which knows no seed."""
    first = score(ids, 0, 0)
    return TokenScore(label, first.log_prob - label, first.top)


def continued(ids: Sequence[int], settings: Settings, place: int = 0) -> tuple[list[TokenScore], str]:
    """What a request must get, and why it ends."""
    found: list[TokenScore] = []
    while len(found) < settings.max_new_tokens:
        found.append(score([*ids, *(s.id for s in found)], settings.seed, place))
        if found[-1].id in settings.eos_token_id:
            return found, "eos"
    return found, "length"


class Late:
    """An array that knows when it is read."""

    def __init__(self, x: np.ndarray, name: str, log: list[str]):
        self.x, self.name, self.log = x, name, log

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.log.append(f"read {self.name}")
        return self.x


class FakeEngine:
    """`rows` and the other shapes come with `allocate`. Fails at program number `fails_at`; waits while `gate` is not
    set."""

    def __init__(self, fails_at: int | None = None, parts: int = 1):
        self.parts = parts
        self.log: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails_at, self.count = fails_at, 0

    def _begin(self, name: str) -> str:
        self.gate.wait()
        self.count += 1
        if self.count == self.fails_at:
            raise RuntimeError("the device is gone")
        name = f"{name} {self.count}"
        self.log.append(name)
        return name

    def allocate(self, prepared: Any, sampling: Any, *, slots: int) -> Any:
        self._begin("allocate")
        B = len(sampling.place)
        self.slots_BS, self.stretch_BS = np.full((B, slots), -1), np.zeros((B, slots), np.float32)
        self.length_B, self.step_B = np.zeros(B, int), np.zeros(B, np.int32)
        self.token_B, self.reason_B = np.zeros(B, int), np.full(B, Reason.NO_PROMPT, np.int8)
        self.seed_B, self.place_B, self.limit_B = np.zeros(B, int), np.zeros(B, int), np.zeros(B, int)
        self.eos_B: list[set[int]] = [set()] * B
        return "state"

    def copy_slots(self, state: Any, row_from: int, row_to: int, chunks: int, size: int) -> Any:
        self._begin(f"copy {row_from}>{row_to}x{chunks}")
        assert chunks == 0 or self.length_B[row_from] >= chunks * size
        for slots in (self.slots_BS, self.stretch_BS):
            slots[row_to, : chunks * size] = slots[row_from, : chunks * size]
        self.length_B[row_to], self.reason_B[row_to] = chunks * size, Reason.NO_PROMPT
        return state

    def extend(self, prepared: Any, state: Any, chunk: Any, sampling: Any) -> Any:
        R, C = chunk.ids_RC.shape
        name = self._begin(f"extend {'+'.join(f'{r}@{s}' for r, s, n in zip(*chunk[1:4], strict=True) if n)}")
        h_RCD = np.full((R, C), None, object)
        tokens, reasons = np.full((R, 1), -1, np.int32), np.full(R, Reason.NO_PROMPT, np.int8)
        log_probs = _no_scores(R, 1)
        for i in range(R):
            row, start, count = chunk.rows_R[i], chunk.start_R[i], chunk.count_R[i]
            assert row // (len(self.step_B) // self.parts) == i // (R // self.parts), "a place of another part"
            if count == 0:
                continue
            assert start % C == 0
            self.slots_BS[row, start : start + count] = chunk.ids_RC[i, :count]
            stretch = 1.0 if chunk.stretch_R is None else chunk.stretch_R[i]
            self.stretch_BS[row, start : start + count] = stretch
            assert (self.stretch_BS[row, : start + count] == stretch).all(), "keys of another stretch"
            self.length_B[row], self.reason_B[row] = start + count, Reason.NO_PROMPT
            for t in range(count):
                h_RCD[i, t] = self.slots_BS[row, : start + t + 1].tolist()
            if chunk.is_last_R[i]:
                prompt = chunk.prompt_RS[i][chunk.prompt_RS[i] >= 0].tolist()
                assert prompt == self.slots_BS[row, : start + count].tolist()
                self.seed_B[row], self.place_B[row] = sampling.seed[i], sampling.place[i]
                self.limit_B[row], self.eos_B[row] = sampling.limit[i], set(sampling.eos_token_id[i].tolist())
                self.step_B[row], self.reason_B[row] = 0, Reason.RUNNING
                tokens[i, 0] = self._choose(row, log_probs, i, 0)
                reasons[i] = self.reason_B[row]
        return state, self._emitted(name, tokens, log_probs, tokens[:, 0], reasons), h_RCD

    def decode(self, prepared: Any, state: Any, steps: int, cancel_B: np.ndarray) -> Any:
        name = self._begin(f"decode {steps}:{''.join('.x'[int(not c)] for c in cancel_B)}")
        B = len(self.step_B)
        self.reason_B[cancel_B & (self.reason_B == Reason.RUNNING)] = Reason.CANCELLED
        tokens, log_probs = np.full((B, STEPS), -1, np.int32), _no_scores(B, STEPS)
        for k in range(steps):
            for row in np.flatnonzero(self.reason_B == Reason.RUNNING):
                self.slots_BS[row, self.length_B[row]] = self.token_B[row]
                self.length_B[row] += 1
                tokens[row, k] = self._choose(row, log_probs, row, k)
        return state, self._emitted(name, tokens, log_probs, self.step_B.copy(), self.reason_B.copy())

    def score_chunk(self, prepared: Any, h_RCD: np.ndarray, labels_RC: np.ndarray) -> LogProbs:
        name = self._begin("score")
        found = _no_scores(*labels_RC.shape)
        for (i, t), ids in np.ndenumerate(h_RCD):
            if ids is not None:
                _write(found, i, t, prompt_score(ids, int(labels_RC[i, t])))
        return LogProbs(*(Late(x, name, self.log) for x in found))

    def _choose(self, row: int, log_probs: LogProbs, i: int, k: int) -> int:
        ids = self.slots_BS[row, : self.length_B[row]].tolist()
        found = score(ids, int(self.seed_B[row]), int(self.place_B[row]))
        _write(log_probs, i, k, found)
        self.token_B[row], self.step_B[row] = found.id, self.step_B[row] + 1
        if found.id in self.eos_B[row]:
            self.reason_B[row] = Reason.EOS
        elif self.step_B[row] >= self.limit_B[row]:
            self.reason_B[row] = Reason.LIMIT
        return found.id

    def _emitted(self, name: str, tokens, log_probs: LogProbs, step, reason) -> Emitted:
        late = [Late(x, name, self.log) for x in (tokens, step, reason)]
        return Emitted(late[0], log_probs, *late[1:])  # type: ignore[arg-type]  # arrays of numpy


def _no_scores(*shape: int) -> LogProbs:
    return LogProbs(np.zeros(shape), np.zeros((*shape, TOP), np.int32), np.zeros((*shape, TOP)))


def _write(found: LogProbs, i: int, k: int, one: TokenScore) -> None:
    found.chosen_X[i, k] = one.log_prob
    found.top_ids_XP[i, k], found.top_XP[i, k] = zip(*one.top, strict=True)
