"""Continuing many prompts over a few rows: a row that has ended is given the next prompt while the others run.

Answers have very different lengths. In fixed batches every row waits for the longest one of its batch; here rows wait
at most for the end of a group of decoding steps, and at the very end for each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.infer import engine
from bc2_jax.infer.chunks import PlacedPrompt, make_chunk
from bc2_jax.infer.decoding import STEPS, Reason
from bc2_jax.infer.engine import Prepared
from bc2_jax.infer.generate import Continuation, Continuations, cache_slots, check_prompts
from bc2_jax.infer.settings import Sampling, Settings, is_whole, sampling_of
from bc2_jax.sharding import parts, to_host, use_mesh_of
from bc2_jax.validation import require

GROUP = STEPS
"""Decoding steps after which rows that have ended are given new prompts, by default. A row waits for half of them on
average, so of answers of n tokens 4 / n of the work is lost; and the host, which looks at the rows between two groups,
takes less than a step's time for it."""


Stops = Callable[[dict[int, list[int]]], Collection[int]]
"""Called after each group with the new tokens so far of the prompts that are being continued, by their places; answers
which of them need no more."""


class Stopped(Exception):
    """`progress` returned False."""


class RefillStats(NamedTuple):
    """How much of the decoding was of use. A row step is one row in one step of decoding."""

    decode_steps: int
    row_steps_used: int
    """Those that gave an answer a token; the first token of each comes from its prefill."""
    row_steps_total: int
    """decode_steps * rows."""
    row_steps_in_batches: int
    """What the same answers take in fixed batches of as many rows, in the order of the prompts."""
    prefills: int
    """Programs that ran prompts."""

    @property
    def share_used(self) -> float:
        """1 where no row ever waited."""
        return self.row_steps_used / max(self.row_steps_total, 1)

    @property
    def share_used_in_batches(self) -> float:
        """`share_used` of fixed batches."""
        return self.row_steps_used / max(self.row_steps_in_batches, 1)


@dataclasses.dataclass(frozen=True)
class RolloutShapes:
    """What decides the shapes of all programs."""

    rows: int
    """Prompts that are continued at one time."""
    prefill_rows: int
    """Prompts that are run together to start them."""
    slots: int
    """Of the cache: prompt and answer, rounded up."""

    @classmethod
    def of(cls, rows: int, prefill_rows: int | None, length: int) -> RolloutShapes:
        """Those of `continue_many` on the mesh in use, for prompts and answers of together `length` tokens.

        Raises ValueError as it does.
        """
        cut = parts("batch")
        if prefill_rows is None:
            least = min(engine.least_rows(), max(rows // cut, 1)) if is_whole(rows) else 1
            prefill_rows = max(rows // 4 // cut, least) * cut if is_whole(rows) else cut
        for name, count in (("rows", rows), ("prefill_rows", prefill_rows)):
            legal = f"it must be a positive multiple of {cut}, the parts of a batch on this mesh"
            require(is_whole(count) and count > 0 and count % cut == 0, name, count, legal)
        legal = f"it must be at most rows = {rows}"
        require(prefill_rows <= rows, "prefill_rows", prefill_rows, legal)
        return cls(rows, prefill_rows, cache_slots(length))


def continue_many(
    prepared: Prepared,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    rows: int,
    log_probs: bool = False,
    log_prob_temperature: float = 1.0,
    prompt_slots: int | None = None,
    prefill_rows: int | None = None,
    group: int = GROUP,
    progress: Callable[[str], bool] | None = None,
    stops: Stops | None = None,
    limits: Sequence[int] | None = None,
) -> tuple[list[Continuation], RefillStats]:
    """The continuation of each prompt, as `continue_prompts` gives it, and how well the rows were used.

    `rows` prompts are continued at one time, in a cache of one shape; both `rows` and `prefill_rows`, the number of
    prompts that are run together to start them (by default a quarter of the rows), must be multiples of the parts into
    which the mesh cuts the batch. `prompt_slots` is the length of the longest prompt that may come, by default that of
    `prompts`. All shapes follow from these arguments, the prepared model and `settings.max_new_tokens`: a call with
    other prompts and another seed compiles nothing.

    A continuation depends on the seed, the place of its prompt in `prompts` and its ids alone, up to the rounding of
    matmuls of another shape; which row it gets is decided by the lengths of the answers, so that the same call gives
    the same bits. With several processes all of them call it with the same arguments and all get the same.

    `limits` are the new tokens of each prompt, at most `settings.max_new_tokens`, which they all have by default.

    `log_probs` are of the logits as the model gave them, divided by `log_prob_temperature`: give the temperature of
    `settings` to have the log-probabilities of what is sampled from, if settings cut nothing off.

    `progress` is told after each group how many continuations are done; all processes must return the same. `stops` may
    end continuations after each group: their reason is "stopped", their tokens are all that there are by then.

    Raises ValueError as `continue_prompts`, for a prompt longer than prompt_slots, and for rows, prefill_rows, group or
    limits that are not valid; `Stopped` as soon as progress returns False.
    """
    settings = settings.check(prepared.config)
    most = settings.max_new_tokens
    prompts = check_prompts(prepared.config, prompts, most if limits is None else limits, prepared.max_length)
    limits = [most] * len(prompts) if limits is None else limits
    require(all(1 <= limit <= most for limit in limits), "limits", limits, f"they must be in 1..{most}")
    longest = max(map(len, prompts))
    if prompt_slots is None:
        # Beyond the slots of the longest prompt, which may have fewer new tokens than a shorter one.
        most = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) - longest
    prompt_slots = longest if prompt_slots is None else prompt_slots
    legal = f"it must be a whole number, at least the {longest} tokens of the longest prompt"
    require(is_whole(prompt_slots) and prompt_slots >= longest, "prompt_slots", prompt_slots, legal)
    require(is_whole(group) and 1 <= group <= STEPS, "group", group, f"it must be a whole number in 1..{STEPS}")
    require(log_prob_temperature > 0, "log_prob_temperature", log_prob_temperature, "it must be positive")
    with use_mesh_of(prepared.params["norm"]["weight"]):
        shapes = RolloutShapes.of(rows, prefill_rows, prompt_slots + most)
        each = [dataclasses.replace(settings, max_new_tokens=limit) for limit in limits]
        rollout = _Rollout(prepared, prompts, each, shapes, log_prob_temperature if log_probs else None)
        while rollout.done < len(prompts):
            rollout.refill()
            rollout.decode(group, stops)
            if progress is not None and not progress(f"answer {rollout.done} of {len(prompts)}"):
                raise Stopped
        return rollout.result()


class _Rollout:
    """The rows, and which prompt each of them continues."""

    def __init__(
        self, prepared: Prepared, prompts: list[Sequence[int]], settings: list[Settings], shapes: RolloutShapes,
        log_prob_temperature: float | None,
    ):  # fmt: skip
        self._prepared, self._prompts, self._settings, self._shapes = prepared, prompts, settings, shapes
        self._log_prob_temperature = log_prob_temperature
        self._found: dict[int, Continuation] = {}
        self._prompt_of: dict[int, int] = {}
        """The prompt of each row that runs."""
        self._rows = Continuations(shapes.rows)
        self._num_started = self._decode_steps = self._row_steps_used = self._prefills = 0
        self._decoding = engine.allocate(prepared, self._sampling([0] * shapes.rows), slots=shapes.slots)
        self._cancel_B = np.zeros(shapes.rows, bool)

    @property
    def done(self) -> int:
        """Prompts whose continuation has ended."""
        return len(self._found)

    def refill(self) -> None:
        """Gives the free rows the next prompts, in their order."""
        while self._num_started < len(self._prompts):
            placed = self._place()
            if not any(placed):
                return
            self._prefill(placed)

    def decode(self, steps: int, stops: Stops | None) -> None:
        """At most so many tokens more of each row; takes the continuations of those that end or that `stops` names."""
        before = sum(map(len, self._rows.tokens))
        if any(row in self._prompt_of for row in self._rows.running):
            self._decoding, emitted = engine.decode(self._prepared, self._decoding, steps, self._cancel_B)
            gained = to_host(emitted.tokens_BK)
            self._rows.add(emitted)
            self._decode_steps += int((gained >= 0).sum(axis=1).max())
            self._cancel_B = np.zeros(self._shapes.rows, bool)
        self._row_steps_used += sum(map(len, self._rows.tokens)) - before
        running = [row for row in self._prompt_of if self._rows.reasons[row] == Reason.RUNNING]
        if stops is not None:
            named = stops({self._prompt_of[row]: list(self._rows.tokens[row]) for row in running})
            for row in running:
                if self._prompt_of[row] in named:
                    self._rows.reasons[row], self._cancel_B[row] = int(Reason.CANCELLED), True
        for row in [row for row in self._prompt_of if self._rows.reasons[row] != Reason.RUNNING]:
            self._found[self._prompt_of.pop(row)] = self._rows.get(row)

    def result(self) -> tuple[list[Continuation], RefillStats]:
        """All continuations in the order of their prompts, once all have ended."""
        found, rows = [self._found[prompt] for prompt in range(len(self._prompts))], self._shapes.rows
        decoded = [len(continuation.tokens) - 1 for continuation in found]
        in_batches = rows * sum(max(decoded[i : i + rows]) for i in range(0, len(decoded), rows))
        total = rows * self._decode_steps
        return found, RefillStats(self._decode_steps, self._row_steps_used, total, in_batches, self._prefills)

    def _place(self) -> list[PlacedPrompt | None]:
        """The next prompts at the places of a chunk whose part of the batch has a free row; takes the rows."""
        shapes = self._shapes
        cut = parts("batch")
        per_part, rows_per_part = shapes.prefill_rows // cut, shapes.rows // cut
        placed: list[PlacedPrompt | None] = [None] * shapes.prefill_rows
        for part in range(cut):
            rows = range(part * rows_per_part, (part + 1) * rows_per_part)
            free = [row for row in rows if row not in self._prompt_of]
            # A chunk with a place for each row has row i at place i.
            places = [row - rows[0] for row in free] if per_part == len(rows) else range(per_part)
            for place, row in zip(places, free, strict=False):
                if self._num_started < len(self._prompts):
                    prompt = self._num_started
                    placed[part * per_part + place] = PlacedPrompt(row, self._prompts[prompt])
                    self._prompt_of[row], self._num_started = prompt, prompt + 1
        return placed

    def _prefill(self, placed: list[PlacedPrompt | None]) -> None:
        size = engine.chunk_length()
        settings = self._sampling([0 if at is None else self._prompt_of[at.row] for at in placed])
        longest = max(len(at.ids) for at in placed if at is not None)
        stretches = None if self._prepared.long_context is None else list(map(self._stretch, placed))
        for start in range(0, longest, size):
            chunk = make_chunk(placed, start, size, self._shapes.slots, stretches)
            self._decoding, emitted, _ = engine.extend(self._prepared, self._decoding, chunk, settings)
            self._prefills += 1
            ends = [at.row if at is not None and chunk.is_last_R[i] else -1 for i, at in enumerate(placed)]
            for row in ends:
                if row >= 0:
                    self._rows.clear(row)
            self._rows.add(emitted, ends)
        # The row's last prompt may have been cancelled; the new one is not.
        self._cancel_B[[at.row for at in placed if at is not None]] = False

    def _stretch(self, at: PlacedPrompt | None) -> float:
        new = 0 if at is None else self._settings[self._prompt_of[at.row]].max_new_tokens
        return self._prepared.stretch(0 if at is None else len(at.ids) + new)

    def _sampling(self, prompts: Sequence[int]) -> Sampling:
        temperature = self._log_prob_temperature
        sampling = sampling_of(
            [self._settings[prompt] for prompt in prompts], prompts, 1.0 if temperature is None else temperature
        )
        if temperature is None:
            return sampling
        return sampling._replace(top_log_probs=np.zeros(len(prompts), np.int32))
