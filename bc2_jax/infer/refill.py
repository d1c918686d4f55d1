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
from bc2_jax.infer.engine import Decoding, Prepared, Reason
from bc2_jax.infer.generate import Continuation, bucket, check_prompts, read_rows
from bc2_jax.infer.sampling import Sampling, Settings, is_whole, sampling_of
from bc2_jax.sharding import from_host, parts, to_host, use_mesh_of
from bc2_jax.validation import require

GROUP = 8
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
    prompt_slots: int
    """Tokens of a prompt, rounded up."""
    slots: int
    """Of the cache: prompt and answer, rounded up."""

    @classmethod
    def of(cls, rows: int, prefill_rows: int | None, prompt_slots: int, max_new_tokens: int) -> RolloutShapes:
        """Those of `continue_many` on the mesh in use. Raises ValueError as it does."""
        cut = parts("batch")
        if prefill_rows is None:
            prefill_rows = max(rows // 4 // cut, 1) * cut if is_whole(rows) else cut
        for name, count in (("rows", rows), ("prefill_rows", prefill_rows)):
            legal = f"it must be a positive multiple of {cut}, the parts of a batch on this mesh"
            require(is_whole(count) and count > 0 and count % cut == 0, name, count, legal)
        return cls(rows, prefill_rows, bucket(prompt_slots), bucket(prompt_slots + max_new_tokens))


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
    prompts = check_prompts(prepared.config, prompts, most if limits is None else limits)
    limits = [most] * len(prompts) if limits is None else limits
    require(all(1 <= limit <= most for limit in limits), "limits", limits, f"they must be in 1..{most}")
    longest = max(map(len, prompts))
    if prompt_slots is None:
        # Beyond the slots of the longest prompt, which may have fewer new tokens than a shorter one.
        most = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) - longest
    prompt_slots = longest if prompt_slots is None else prompt_slots
    legal = f"it must be a whole number, at least the {longest} tokens of the longest prompt"
    require(is_whole(prompt_slots) and prompt_slots >= longest, "prompt_slots", prompt_slots, legal)
    require(is_whole(group) and group >= 1, "group", group, "it must be a whole number, at least 1")
    require(log_prob_temperature > 0, "log_prob_temperature", log_prob_temperature, "it must be positive")
    with use_mesh_of(prepared.params["norm"]["weight"]):
        shapes = RolloutShapes.of(rows, prefill_rows, prompt_slots, most)
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
        # As in `continue_prompts`, so that all greedy calls share one compiled function.
        self._top_k = 0 if settings[0].temperature == 0 else settings[0].top_k
        self._found: dict[int, Continuation] = {}
        self._prompt_of: dict[int, int] = {}
        """The prompt of each row that runs."""
        self._prefilled: Decoding | None = None
        self._ready: list[tuple[int, int]] = []
        """Rows of `_prefilled` that are in no row yet, and their prompts."""
        self._num_prefilled = self._decode_steps = self._row_steps_used = self._prefills = 0
        self._step_B = np.zeros(shapes.rows, np.int32)
        self._decoding = engine.allocate(
            prepared, self._sampling([0] * shapes.rows), length=shapes.slots, log_probs=log_prob_temperature is not None
        )

    @property
    def done(self) -> int:
        """Prompts whose continuation has ended."""
        return len(self._found)

    def refill(self) -> None:
        """Gives the free rows the next prompts, in their order."""
        free = [row for row in range(self._shapes.rows) if row not in self._prompt_of]
        while free:
            if not self._ready:
                if self._num_prefilled == len(self._prompts):
                    return
                self._prefill()
            assert self._prefilled is not None  # as something is ready
            rows_to, free = free[: len(self._ready)], free[len(self._ready) :]
            taken, self._ready = self._ready[: len(rows_to)], self._ready[len(rows_to) :]
            self._decoding = engine.insert(self._decoding, self._prefilled, [row for row, _ in taken], rows_to)
            self._prompt_of |= {row: prompt for row, (_, prompt) in zip(rows_to, taken, strict=True)}
            self._step_B[rows_to] = 1

    def decode(self, steps: int, stops: Stops | None) -> None:
        """At most so many tokens more of each row; takes the continuations of those that end or that `stops` names."""
        decoding = engine.decode(self._prepared, self._decoding, top_k=self._top_k, steps=steps)
        self._decoding = decoding
        step_B, reason_B = np.array(to_host(decoding.step_B)), to_host(decoding.reason_B)
        gained_B, self._step_B = step_B - self._step_B, step_B
        self._decode_steps += int(gained_B.max())
        self._row_steps_used += int(gained_B.sum())
        if stops is not None:
            reason_B = self._stop(stops, step_B, reason_B)
        ended = [row for row in self._prompt_of if reason_B[row] != Reason.RUNNING]
        if ended:
            found = read_rows(decoding, ended, step_B, reason_B)
            self._found |= {self._prompt_of.pop(row): c for row, c in zip(ended, found, strict=True)}

    def _stop(self, stops: Stops, step_B: np.ndarray, reason_B: np.ndarray) -> np.ndarray:
        """`reason_B` with the rows that `stops` names cancelled, here and on the device."""
        running = [row for row in self._prompt_of if reason_B[row] == Reason.RUNNING]
        so_far = read_rows(self._decoding, running, step_B, reason_B) if running else []
        named = stops({self._prompt_of[row]: c.tokens for row, c in zip(running, so_far, strict=True)})
        stopped = [row for row in running if self._prompt_of[row] in named]
        if stopped:
            reason_B = reason_B.copy()
            reason_B[stopped] = Reason.CANCELLED
            self._decoding = self._decoding._replace(reason_B=from_host(reason_B))
        return reason_B

    def result(self) -> tuple[list[Continuation], RefillStats]:
        """All continuations in the order of their prompts, once all have ended."""
        found, rows = [self._found[prompt] for prompt in range(len(self._prompts))], self._shapes.rows
        decoded = [len(continuation.tokens) - 1 for continuation in found]
        in_batches = rows * sum(max(decoded[i : i + rows]) for i in range(0, len(decoded), rows))
        total = rows * self._decode_steps
        return found, RefillStats(self._decode_steps, self._row_steps_used, total, in_batches, self._prefills)

    def _prefill(self) -> None:
        """Runs the next prompts. They stand at the left, so that a row uses no slot for padding."""
        shapes, pad = self._shapes, self._prepared.config.pad_token_id
        first = self._num_prefilled
        prompts = self._prompts[first : first + shapes.prefill_rows]
        ids_BT = np.full((shapes.prefill_rows, shapes.prompt_slots), pad, np.int32)
        segments_BT = np.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)], segments_BT[row, : len(prompt)] = prompt, 1
        self._prefilled = engine.prefill(
            self._prepared, ids_BT, segments_BT, self._sampling(range(first, first + shapes.prefill_rows)),
            length=shapes.prompt_slots, top_k=self._top_k, log_probs=self._log_prob_temperature is not None,
        )  # fmt: skip
        self._ready = [(row, first + row) for row in range(len(prompts))]
        self._num_prefilled += len(prompts)
        self._prefills += 1

    def _sampling(self, places: Sequence[int]) -> Sampling:
        temperature = 1.0 if self._log_prob_temperature is None else self._log_prob_temperature
        last = len(self._settings) - 1  # rows of no prompt have its settings
        return sampling_of([self._settings[min(place, last)] for place in places], places, temperature)
