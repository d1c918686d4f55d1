"""Assigns rows to requests and plans each turn. Runs in one thread; handles neither time limits nor the queue.

Room for prompt and new tokens is reserved when a request gets a row, so no request is ever interrupted. A turn runs one
chunk of a few prompts, in rotation, and some decoding steps of all rows whose prompt was read. Its results are read
after the next turn was dispatched, so the device does not wait for the host. A row whose request has ended therefore
computes along for one more turn; it is free once its end was read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from bc2_jax.infer.decoding import LogProbs, Reason
from bc2_jax.model.position import stretch_of
from bc2_jax.serve.followers import Leader
from bc2_jax.serve.prefixes import Prefixes, hash_chunks
from bc2_jax.serve.requests import Ended, Event, Failed, Handle, PromptScored, Started, Tokens, TokenScore
from bc2_jax.serve.stats import Observe, Stats
from bc2_jax.serve.turns import Kind, Results, Runner, Shapes, Turn, empty_turn

_REASONS: dict[int, Literal["eos", "length"]] = {Reason.EOS: "eos", Reason.LIMIT: "length"}


class Served:
    """A request that has a row."""

    def __init__(self, handle: Handle, shapes: Shapes):
        self.handle, self.request = handle, handle.request
        ids, owner, chunk = self.request.ids, self.request.owner, shapes.chunk
        self.row = -1
        self.stretch = 1.0 if shapes.trained is None else stretch_of(self.request.reserved, shapes.trained)
        """Position stretch, from all tokens that the request may have, so that it stays constant."""
        self.hashes = hash_chunks(ids, chunk, owner, self.stretch)
        """Hashes of the complete chunks of the prompt."""
        self.reusable = self.hashes[: (len(ids) - 1) // chunk]
        """Hashes of chunks that may be copied: not the last, whose hidden states give the first token."""
        if self.request.prompt_log_probs is not None:
            self.reusable = []  # all hidden states are needed
        self.filled = self.cached = 0
        """Prompt tokens in the cache once everything planned has run; and how many of them were copied."""
        self.asked = self.received = 0
        """New tokens planned at most; new tokens received."""
        self.scores: list[TokenScore | None] = [None]
        self.admitted = self.newest = time.monotonic()
        self.is_over = False
        """Whether it has given back its row; later results are dropped."""

    @property
    def is_read(self) -> bool:
        return self.filled == len(self.request.ids)

    def reuse(self, filled: int) -> None:
        """Marks the first `filled` prompt tokens as present without computing them."""
        self.cached += filled - self.filled
        self.filled = filled


class Planned(NamedTuple):
    """A turn and the requests that its results belong to."""

    turn: Turn
    chunks: dict[int, Served]  # by place
    rows: Collection[Served]

    @property
    def is_empty(self) -> bool:
        return not self.chunks and not self.turn.steps


class Scheduler:
    """The rows and their requests."""

    def __init__(self, runner: Runner | Leader, stats: Stats, observe: Observe | None = None):
        self._runner, self._stats = runner, stats
        self._observe: Observe = observe or (lambda name, value: None)
        shapes = self._shapes = runner.shapes
        self._prefixes = Prefixes(shapes.rows, shapes.parts)
        self._free = list(range(shapes.rows))  # the one that ended longest ago first
        self._served: dict[Handle, Served] = {}
        self._to_read: list[deque[Served]] = [deque() for _ in range(shapes.parts)]
        self._not_run: deque[Planned] = deque()
        self._in_flight: deque[tuple[Planned, Results]] = deque()
        self._last_read = 0.0
        self.row_s = 1.0
        """Seconds that a request has its row, a running mean."""
        stats.rows, stats.slots = shapes.rows, shapes.rows * shapes.slots

    @property
    def free_rows(self) -> int:
        return len(self._free)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to run and nothing to read."""
        planned = [*self._not_run, *(planned for planned, _ in self._in_flight)]
        return not self._served and all(p.is_empty for p in planned)

    @property
    def served(self) -> list[Handle]:
        return list(self._served)

    def admit(self, handle: Handle) -> None:
        served = self._served[handle] = Served(handle, self._shapes)
        row = served.row = self._prefixes.choose(self._free, served.reusable)
        self._free.remove(row)
        served.reuse(self._prefixes.count_held(row, served.reusable) * self._shapes.chunk)
        self._to_read[self._prefixes.part_of(row)].append(served)
        self._observe("queue_s", served.admitted - handle.submitted)
        self._set_gauges()

    def end(self, handle: Handle, event: Ended | Failed) -> bool:
        """Ends a request early and frees its row; returns whether it had one."""
        served = self._served.get(handle)
        if served is not None:
            self._give_back(served, event)
        return served is not None

    def turn(self) -> None:
        """Dispatches a turn, then reads the results of the previous one."""
        planned = self._plan()
        self._not_run.append(planned)
        results = self._runner.run(planned.turn)
        if self._last_read and not planned.is_empty:
            self._observe("host_s", time.monotonic() - self._last_read)
        if results is not None:
            self._in_flight.append((self._not_run.popleft(), results))
        if len(self._in_flight) > 1:
            self._read(*self._in_flight.popleft())
        self._set_gauges()

    def _set_gauges(self) -> None:
        """Slots first: another thread that sees the last request end must not see its slots in use."""
        self._stats.slots_used = sum(s.filled + s.received for s in self._served.values())
        self._stats.running = len(self._served)

    # --------------------------------------------------------------------------------------------------------- planning

    def _plan(self) -> Planned:
        shapes = self._shapes
        at_place: dict[int, Served] = {}
        for part, queue in enumerate(self._to_read):
            for i in range(min(shapes.places, len(queue))):
                at_place[part * shapes.places + i] = queue.popleft()
        requests = [at_place[i].request if i in at_place else None for i in range(shapes.parts * shapes.places)]
        turn = empty_turn(shapes, requests=requests)
        for place, served in at_place.items():
            self._take_chunk(turn, place, served)
        for served in at_place.values():
            # Only now, because copies run before the chunks of this turn.
            self._prefixes.hold(served.row, served.hashes[: served.filled // shapes.chunk])
            if not served.is_read:
                self._to_read[self._prefixes.part_of(served.row)].append(served)
        running = [s for s in self._served.values() if s.is_read]
        left = max((s.request.settings.max_new_tokens - s.asked for s in running), default=0)
        steps = min(left, shapes.prefill_steps if any(self._to_read) else shapes.steps)
        for served in running:
            turn.cancel_B[served.row] = False
            served.asked += steps
        is_empty = not at_place and steps == 0
        kind = Kind.IDLE if is_empty else Kind.RUN
        turn = turn._replace(steps=np.array(steps, np.int32), kind=np.array(kind, np.int32))
        return Planned(turn, at_place, running if steps else ())

    def _take_chunk(self, turn: Turn, place: int, served: Served) -> None:
        """Adds the next chunk of a prompt to the turn, and a copy of earlier chunks if another row holds them."""
        request, row, C = served.request, served.row, self._shapes.chunk
        source, chunks = self._prefixes.find(self._prefixes.part_of(row), served.reusable)
        if chunks * C > served.filled:
            turn.copy_from_R[place], turn.copy_chunks_R[place] = source, chunks
            served.reuse(chunks * C)
            self._prefixes.hold(row, served.reusable[:chunks])
        start = served.filled
        ids = request.ids[start : start + C]
        served.filled += len(ids)
        chunk = turn.chunk
        chunk.ids_RC[place, : len(ids)] = ids
        chunk.rows_R[place], chunk.start_R[place], chunk.count_R[place] = row, start, len(ids)
        chunk.is_last_R[place] = served.is_read
        if chunk.stretch_R is not None:
            chunk.stretch_R[place] = served.stretch
        if served.is_read:
            chunk.prompt_RS[place, : len(request.ids)] = request.ids
            served.asked = 1
        if request.prompt_log_probs is not None:
            labels = request.ids[start + 1 : start + 1 + C]
            turn.labels_RC[place, : len(labels)] = labels

    # ---------------------------------------------------------------------------------------------------------- reading

    def _read(self, planned: Planned, results: Results) -> None:
        """Waits for a turn's results and passes them on."""
        scores = None if results.scores is None else jax.device_get(results.scores)
        first = None if results.first is None else jax.device_get(results.first)
        for place, served in planned.chunks.items():
            if scores is not None and served.request.prompt_log_probs is not None:
                labels = planned.turn.labels_RC[place]
                served.scores += _score(labels[labels >= 0], scores, place, served.request.prompt_log_probs)
            if planned.turn.chunk.is_last_R[place] and not served.is_over:
                self._begin(served)
                self._hand_on(served, first, place)
        if results.new is not None:
            new = jax.device_get(results.new)
            now = time.monotonic()
            if self._last_read:
                self._observe("step_s", (now - self._last_read) / int(planned.turn.steps))
            for served in planned.rows:
                self._hand_on(served, new, served.row)
        self._last_read = 0.0 if planned.is_empty else time.monotonic()

    def _begin(self, served: Served) -> None:
        request = served.request
        self._stats.prompt_tokens += len(request.ids)
        self._stats.cached_tokens += served.cached
        self._observe("prompt_tokens", len(request.ids))
        self._observe("first_token_s", time.monotonic() - served.handle.submitted)
        self._put(served, Started(served.cached, request.settings.seed))
        if request.prompt_log_probs is not None:
            self._put(served, PromptScored(served.scores))

    def _hand_on(self, served: Served, emitted: Any, index: int) -> None:
        """Passes the tokens of one row of `emitted`, and its end, to the reader."""
        if served.is_over:
            return
        tokens_K = emitted.tokens_BK[index]
        tokens_K = tokens_K[tokens_K >= 0]  # they come first
        if len(tokens_K):
            now = time.monotonic()
            if served.received:
                self._observe("token_s", (now - served.newest) / len(tokens_K))
            served.received, served.newest = served.received + len(tokens_K), now
            self._stats.generated_tokens += len(tokens_K)
            top = served.request.top_log_probs
            self._put(
                served, Tokens(tokens_K.tolist() if top is None else _score(tokens_K, emitted.log_probs, index, top))
            )
        reason = int(emitted.reason_B[index])
        if reason != Reason.RUNNING and not served.is_over:
            self._give_back(served, Ended(_REASONS[reason]))

    def _put(self, served: Served, event: Event) -> None:
        if not served.is_over and not served.handle.put(event):
            self._give_back(served, Ended("cancelled"))  # nobody reads

    def _give_back(self, served: Served, event: Ended | Failed) -> None:
        served.is_over = True
        del self._served[served.handle]
        self._free.append(served.row)
        for queue in self._to_read:
            if served in queue:
                queue.remove(served)
        self._set_gauges()
        self._stats.count(event)
        now = time.monotonic()
        self.row_s += 0.1 * (now - served.admitted - self.row_s)
        self._observe("generated_tokens", served.received)
        self._observe("total_s", now - served.handle.submitted)
        served.handle.put(event)


def _score(ids: np.ndarray, log_probs: LogProbs, index: int, top: int) -> list[TokenScore]:
    """The first tokens of one row of `log_probs`, each with the `top` most likely tokens."""
    count = len(ids)
    chosen = log_probs.chosen_X[index][:count].tolist()
    top_ids, top_log_probs = log_probs.top_ids_XP[index][:count, :top], log_probs.top_XP[index][:count, :top]
    tops = zip(top_ids.tolist(), top_log_probs.tolist(), strict=True)
    return [
        TokenScore(token, log_prob, tuple(zip(*likely, strict=True)))
        for token, log_prob, likely in zip(ids.tolist(), chosen, tops, strict=True)
    ]
