"""Generation for many prompts over few rows: a row whose prompt has ended gets the next prompt while others keep
running.

Answers differ much in length. In a fixed batch every row waits for the longest answer; here a row waits at most for the
end of a group of decoding steps, and at the end of the list for the other rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.infer import engine
from bc2_jax.infer.decoding import STEPS, PlacedPrompt, Reason
from bc2_jax.infer.generate import Continuation, Continuations, cache_slots, check_prompts, run_prompts
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.settings import Sampling, Settings, is_whole, sampling_of
from bc2_jax.sharding import parts, to_host, use_mesh_of
from bc2_jax.validation import require

GROUP = STEPS
"""Default number of decoding steps between refills. A finished row waits half of them on average, so answers of n
tokens lose 4 / n of the work; checking the rows takes the host less time than one step.
"""


Stops = Callable[[dict[int, list[int]]], Collection[int]]
"""Called after each group with {prompt index: new tokens so far} of running prompts; returns the indices that need no
more.
"""


class Stopped(Exception):
    """`progress` returned False."""


class RefillStats(NamedTuple):
    """How well the rows were used. A row step is one row in one decoding step."""

    decode_steps: int
    row_steps_used: int
    """Row steps that produced a token. The first token of an answer comes from prefill and does not count."""
    row_steps_total: int
    """decode_steps * rows."""
    row_steps_in_batches: int
    """Row steps that the same answers take in fixed batches of as many rows, in prompt order."""
    prefills: int
    """Number of prefill programs run."""

    @property
    def share_used(self) -> float:
        """1 if no row ever waited."""
        return self.row_steps_used / max(self.row_steps_total, 1)

    @property
    def share_used_in_batches(self) -> float:
        """`share_used` of fixed batches."""
        return self.row_steps_used / max(self.row_steps_in_batches, 1)


@dataclasses.dataclass(frozen=True)
class RolloutShapes:
    """The numbers that determine the shapes of all programs."""

    rows: int
    """Prompts that are continued at the same time."""
    prefill_rows: int
    slots: int
    """Cache slots: prompt plus answer, rounded up."""

    @classmethod
    def of(cls, rows: int, prefill_rows: int | None, length: int) -> RolloutShapes:
        """Shapes of `continue_many` on the current mesh, for prompts plus answers of `length` tokens.

        Raises ValueError as `continue_many`.
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
    """Generates a continuation of each prompt, as `continue_prompts` does, and returns statistics of row use.

    `rows` prompts run at the same time in a cache of one shape. `prefill_rows` prompts (by default a quarter of the
    rows) are prefilled together. Both must be multiples of the number of batch shards. `prompt_slots` is the length of
    the longest prompt to expect, by default that of `prompts`. All shapes follow from these arguments, the prepared
    model and `settings.max_new_tokens`: a call with other prompts and another seed compiles nothing.

    A continuation depends only on the seed, the prompt's index in `prompts` and its ids, up to the rounding of matmuls
    of other shapes. Answer lengths decide which row a prompt gets, so equal calls give equal bits. With several
    processes, all call it with the same arguments and get the same result.

    `limits` are the new tokens of each prompt, at most `settings.max_new_tokens`, which is the default.

    `log_probs` are of the model's logits divided by `log_prob_temperature`: pass the temperature of `settings` to get
    the log-probabilities of the sampled distribution, if settings cut nothing off.

    `progress` gets a text after each group; all processes must return the same. `stops` may end continuations after
    each group; their reason is "stopped" and they keep the tokens generated so far.

    Raises ValueError as `continue_prompts`, for a prompt longer than prompt_slots, and for invalid rows, prefill_rows,
    group or limits; `Stopped` as soon as progress returns False.
    """
    settings = settings.check(prepared.config)
    most = settings.max_new_tokens
    prompts = check_prompts(prepared.config, prompts, most if limits is None else limits, prepared.max_length)
    limits = [most] * len(prompts) if limits is None else limits
    require(all(1 <= limit <= most for limit in limits), "limits", limits, f"they must be in 1..{most}")
    longest = max(map(len, prompts))
    if prompt_slots is None:
        # The longest prompt may have fewer new tokens than a shorter one.
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
    """The batch rows and the prompt that each one continues."""

    def __init__(
        self, prepared: Prepared, prompts: list[Sequence[int]], settings: list[Settings], shapes: RolloutShapes,
        log_prob_temperature: float | None,
    ):  # fmt: skip
        self._prepared, self._prompts, self._settings, self._shapes = prepared, prompts, settings, shapes
        self._log_prob_temperature = log_prob_temperature
        self._found: dict[int, Continuation] = {}
        self._prompt_of: dict[int, int] = {}
        """The prompt index of each running row."""
        self._rows = Continuations(shapes.rows)
        self._num_started = self._decode_steps = self._row_steps_used = self._prefills = 0
        self._decoding = engine.allocate(prepared, self._sampling([0] * shapes.rows), slots=shapes.slots)
        self._cancel_B = np.zeros(shapes.rows, bool)

    @property
    def done(self) -> int:
        """Number of prompts whose continuation has ended."""
        return len(self._found)

    def refill(self) -> None:
        while self._num_started < len(self._prompts):
            placed = self._place()
            if not any(placed):
                return
            self._prefill(placed)

    def decode(self, steps: int, stops: Stops | None) -> None:
        """Generates up to `steps` tokens per row; collects continuations that end or that `stops` names."""
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
        """All continuations in prompt order, once all have ended."""
        found, rows = [self._found[prompt] for prompt in range(len(self._prompts))], self._shapes.rows
        decoded = [len(continuation.tokens) - 1 for continuation in found]
        in_batches = rows * sum(max(decoded[i : i + rows]) for i in range(0, len(decoded), rows))
        total = rows * self._decode_steps
        return found, RefillStats(self._decode_steps, self._row_steps_used, total, in_batches, self._prefills)

    def _place(self) -> list[PlacedPrompt | None]:
        """Assigns the next prompts to free rows and to chunk places of the same batch shard."""
        shapes = self._shapes
        cut = parts("batch")
        per_part, rows_per_part = shapes.prefill_rows // cut, shapes.rows // cut
        placed: list[PlacedPrompt | None] = [None] * shapes.prefill_rows
        for part in range(cut):
            rows = range(part * rows_per_part, (part + 1) * rows_per_part)
            free = [row for row in rows if row not in self._prompt_of]
            # If a chunk has a place for each row, row i is at place i.
            places = [row - rows[0] for row in free] if per_part == len(rows) else range(per_part)
            for place, row in zip(places, free, strict=False):
                if self._num_started < len(self._prompts):
                    prompt = self._num_started
                    placed[part * per_part + place] = PlacedPrompt(row, self._prompts[prompt])
                    self._prompt_of[row], self._num_started = prompt, prompt + 1
        return placed

    def _prefill(self, placed: list[PlacedPrompt | None]) -> None:
        prompts = [0 if at is None else self._prompt_of[at.row] for at in placed]
        limits = [self._settings[prompt].max_new_tokens for prompt in prompts]
        rows = [at.row for at in placed if at is not None]
        for row in rows:
            self._rows.clear(row)
        self._cancel_B[rows] = False  # `stops` may have named the row's last prompt, not the new one
        self._decoding, count = run_prompts(
            self._prepared, self._decoding, placed, limits, self._sampling(prompts), self._rows
        )
        self._prefills += count

    def _sampling(self, prompts: Sequence[int]) -> Sampling:
        settings, temperature = [self._settings[prompt] for prompt in prompts], self._log_prob_temperature
        if temperature is None:
            return sampling_of(settings, prompts)
        return sampling_of(settings, prompts, temperature, top_log_probs=[0] * len(prompts))
