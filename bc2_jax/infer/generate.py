"""Generation from token ids: `generate` and `continue_prompts`, for a batch of prompts that run together.

Cache slots are rounded up (`bucket`), so calls of similar length share compiled programs: one per (batch, slots).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jax import Array

from bc2_jax.config import ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import STEPS, Decoding, Emitted, PlacedPrompt, Reason, make_chunk
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.settings import DEFAULT_SETTINGS, Sampling, Settings, is_whole, sampling_of
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.sharding import parts, to_host, use_mesh_of
from bc2_jax.validation import require, show

_REASONS: dict[int, Literal["eos", "stopped"]] = {Reason.EOS: "eos", Reason.CANCELLED: "stopped"}
OnToken = Callable[[int, list[int | None]], bool | Sequence[bool] | None]
"""Called at each step, from 0, with the new token of each prompt, or None for prompts that have ended.

Its result can stop prompts: True stops all, a sequence of one bool per prompt stops some, None or False stops none. A
stopped prompt keeps the token just given.
"""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """The new tokens of a prompt."""

    tokens: list[int]
    """Includes the eos that ended it."""
    reason: Literal["eos", "length", "stopped"]
    """An eos, max_new_tokens reached, or stopped by on_token."""
    log_probs: list[float] | None
    """Of each token, in nats: log_softmax of the model's fp32 logits before repetition penalty, temperature, top_k and
    top_p, divided by `log_prob_temperature` if it was given. None if not requested.
    """


def generate(
    model: Baichuan2 | Prepared,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = Settings.max_new_tokens,
    temperature: float = Settings.temperature,
    top_k: int = Settings.top_k,
    top_p: float = Settings.top_p,
    repetition_penalty: float = Settings.repetition_penalty,
    seed: int = Settings.seed,
    eos_token_id: int | Sequence[int] | None = Settings.eos_token_id,
    vocab_size: int | None = Settings.vocab_size,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Generates a continuation of each prompt: new tokens only, without the eos that ended it.

    `prompts` are lists or arrays of token ids; nothing is added to them. Generation ends at `eos_token_id` (one id or
    several, by default the config's) or after `max_new_tokens`. temperature 0 is greedy; top_k 0 and top_p 1 cut
    nothing; repetition_penalty 1 is off. The defaults are those of the released chat models. Pass the tokenizer's
    `vocab_size` so that ids without a piece are never sampled: a model may have more ids than its tokenizer.

    A continuation depends on the prompt's place in the list and the seed, not on other prompts or the mesh, up to the
    rounding of matmuls of other shapes. The model's parameters may be sharded. A `Baichuan2` is prepared at every call,
    as a copy beside its parameters: for several calls, or if memory is short, pass the result of `engine.prepare`.

    `on_token` is called after every step and may stop prompts (`OnToken`); without it the host waits only for the end.
    For text in and out, with stop strings, see `infer.text.generate_text`.

    Raises ValueError for an empty list, an empty prompt, ids of another type or out of range, a prompt that leaves no
    room for max_new_tokens in model_max_length, and settings of another type or out of range.
    """
    settings = Settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, eos_token_id, vocab_size)
    found = continue_prompts(model, prompts, settings, on_token=on_token)
    return [c.tokens[:-1] if c.reason == "eos" else c.tokens for c in found]


def continue_prompts(
    model: Baichuan2 | Prepared,
    prompts: Sequence[Sequence[int]],
    settings: Settings = DEFAULT_SETTINGS,
    *,
    log_probs: bool = False,
    on_token: OnToken | None = None,
) -> list[Continuation]:
    """`generate` with the reason and log-probabilities of each continuation; same tokens, arguments and errors."""
    if not isinstance(model, Baichuan2 | Prepared):
        raise ValueError(f"model is a {type(model).__name__}: it must be what load_pretrained or engine.prepare gives.")
    config = model.config
    settings = settings.check(config)
    max_length = model.max_length if isinstance(model, Prepared) else config.model_max_length
    prompts = check_prompts(config, prompts, settings.max_new_tokens, max_length)
    prepared = engine.prepare(model) if isinstance(model, Baichuan2) else model
    with use_mesh_of(prepared.params["norm"]["weight"]):
        rows = batch_rows(len(prompts))
        sampling = sampling_of([settings] * rows, range(rows), top_log_probs=[0] * rows if log_probs else None)
        slots = cache_slots(max(map(len, prompts)) + settings.max_new_tokens)
        decoding = engine.allocate(prepared, sampling, slots=slots)
        placed: list[PlacedPrompt | None] = [PlacedPrompt(row, prompt) for row, prompt in enumerate(prompts)]
        placed += [None] * (rows - len(prompts))
        found = Continuations(rows)
        decoding, _ = run_prompts(prepared, decoding, placed, [settings.max_new_tokens] * rows, sampling, found)
        if on_token is None:
            _finish(prepared, decoding, settings.max_new_tokens, found)
        else:
            _finish_with(on_token, prepared, decoding, len(prompts), found)
        return [found.get(row) for row in range(len(prompts))]


def batch_rows(count: int) -> int:
    """Number of batch rows for `count` prompts on the current mesh."""
    return parts("batch") * max(-(-count // parts("batch")), engine.least_rows())


class Continuations:
    """The tokens that each row of a batch has received so far, on the host."""

    def __init__(self, rows: int):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.reasons = [int(Reason.NO_PROMPT)] * rows
        self._log_probs: list[list[float] | None] = [None] * rows

    def add(self, emitted: Emitted, rows: Sequence[int] | None = None) -> None:
        """Adds a program's new tokens; place i belongs to row rows[i] (by default row i), a negative row to none."""
        tokens, reasons = to_host(emitted.tokens_BK).tolist(), to_host(emitted.reason_B).tolist()
        scores = None if emitted.log_probs is None else to_host(emitted.log_probs.chosen_X).tolist()
        for place, row in enumerate(range(len(tokens)) if rows is None else rows):
            new = [token for token in tokens[place] if token >= 0]
            if row >= 0 and (new or rows is None):
                self.reasons[row] = reasons[place]
                self.tokens[row] += new
                if scores is not None:
                    self._log_probs[row] = (self._log_probs[row] or []) + scores[place][: len(new)]

    def clear(self, row: int) -> None:
        self.tokens[row], self.reasons[row], self._log_probs[row] = [], int(Reason.NO_PROMPT), None

    @property
    def running(self) -> list[int]:
        """Rows that have not ended."""
        return [row for row, reason in enumerate(self.reasons) if reason == Reason.RUNNING]

    def get(self, row: int) -> Continuation:
        return Continuation(self.tokens[row], _REASONS.get(self.reasons[row], "length"), self._log_probs[row])


def run_prompts(
    prepared: Prepared, decoding: Decoding, placed: Sequence[PlacedPrompt | None], limits: Sequence[int],
    sampling: Sampling, found: Continuations,
) -> tuple[Decoding, int]:  # fmt: skip
    """Runs prompts chunk by chunk into their rows and adds the first new token of each to `found`.

    `limits` are the most new tokens of each place. Returns also the number of programs run.
    """
    size, slots = engine.chunk_length(), decoding.cache.k.shape[3]
    stretches = None
    if prepared.long_context is not None:
        lengths = [0 if at is None else len(at.ids) + limit for at, limit in zip(placed, limits, strict=True)]
        stretches = list(map(prepared.stretch, lengths))
    chosen = []
    for start in range(0, max(len(at.ids) for at in placed if at is not None), size):
        chunk = make_chunk(placed, start, size, slots, stretches)
        decoding, emitted, _ = engine.extend(prepared, decoding, chunk, sampling)
        ends = [at.row if at is not None and chunk.is_last_R[i] else -1 for i, at in enumerate(placed)]
        chosen.append((emitted, ends))
    for emitted, ends in chosen:
        found.add(emitted, ends)
    return decoding, len(chosen)


def _finish(prepared: Prepared, decoding: Decoding, max_new_tokens: int, found: Continuations) -> None:
    """Decodes until all rows end. Reads each program's result while the next one runs."""
    nothing = np.zeros(len(decoding.token_B), bool)
    before = None
    for step in range(1, max_new_tokens, STEPS):
        decoding, emitted = engine.decode(prepared, decoding, min(STEPS, max_new_tokens - step), nothing)
        if before is not None:
            found.add(before)
        before = emitted
        if not found.running:
            break
    if before is not None:
        found.add(before)


def _finish_with(on_token: OnToken, prepared: Prepared, decoding: Decoding, count: int, found: Continuations) -> None:
    """Decodes step by step and passes each step's tokens to `on_token`."""
    rows, step = len(decoding.token_B), 0
    while True:
        new = [found.tokens[row][step] if len(found.tokens[row]) > step else None for row in range(count)]
        shown = [None if found.reasons[row] == Reason.EOS else token for row, token in enumerate(new)]
        if all(token is None for token in shown):
            return
        stops = _stops(on_token(step, shown), count)
        cancel_B = np.array([row < count and stops[row] and row in found.running for row in range(rows)])
        for row in np.flatnonzero(cancel_B):
            found.reasons[row] = int(Reason.CANCELLED)
        if not found.running:
            return
        decoding, emitted = engine.decode(prepared, decoding, 1, cancel_B)
        found.add(emitted)
        step += 1


def bucket(length: int) -> int:
    """`length` rounded up to 64, 128 or a multiple of 256."""
    return max(64, 2 ** math.ceil(math.log2(length))) if length <= 128 else -(-length // 256) * 256


def cache_slots(length: int) -> int:
    """Cache slots for `length` tokens on the current devices: 128 or a multiple of 256, at least one chunk."""
    return max(128, bucket(length), engine.chunk_length())


def check_prompts(
    config: ModelConfig, prompts: Any, max_new_tokens: int | Sequence[int], max_length: int | None = None
) -> list[Sequence[int]]:
    """Returns the prompts as a list. Raises ValueError as `generate` for one that is not valid.

    `max_new_tokens` is one number or one per prompt. `max_length` limits a prompt plus its new tokens; by default it is
    the model's trained length.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | dict):
        shown = show(prompts)
        raise ValueError(f"prompts = {shown} is not valid: it must be a list of prompts, each a list of token ids.")
    found = list(prompts)
    if not found:
        raise ValueError("prompts is empty: at least one prompt is needed.")
    limits = [max_new_tokens] * len(found) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    require(len(limits) == len(found), "max_new_tokens", limits, f"it must be one number or {len(found)}, one a prompt")
    for i, (prompt, limit) in enumerate(zip(found, limits, strict=True)):
        _check_prompt(f"prompts[{i}]", prompt, config.vocab_size)
        if len(prompt) + limit > (max_length or config.model_max_length):
            length = f"model_max_length = {config.model_max_length}"
            if max_length not in (None, config.model_max_length):
                length = f"max_length = {max_length}"
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, which with max_new_tokens = {limit} is more than {length}."
            )
    return found


def _check_prompt(name: str, prompt: Any, vocab_size: int) -> None:
    if isinstance(prompt, str | bytes):
        wrong = "is text: it must be token ids, such as tokenizer.encode gives"
    elif is_whole(prompt):
        wrong = "is one id: prompts must be a list of prompts, each a list of token ids"
    elif not isinstance(prompt, Sequence | np.ndarray | Array) or getattr(prompt, "ndim", 1) != 1:
        wrong = "is not valid: it must be a list of token ids"
    else:
        wrong = ""
    if wrong:
        raise ValueError(f"{name} = {show(prompt)} {wrong}.")
    if len(prompt) == 0:
        raise ValueError(f"{name} is empty: at least one token is needed.")
    for token in prompt if isinstance(prompt, Sequence) else np.asarray(prompt).tolist():
        if not is_whole(token) or not 0 <= token < vocab_size:
            raise ValueError(f"{name} has token id {token!r}: it must be a whole number in 0..{vocab_size - 1}.")


def _stops(answer: Any, count: int) -> list[bool]:
    """Which of `count` prompts the result of on_token stops."""
    if answer is None or isinstance(answer, bool | np.bool_):
        return [bool(answer)] * count
    legal = f"it must return None, a bool, or {count} bools, one a prompt"
    right = isinstance(answer, Sequence | np.ndarray) and len(answer) == count
    require(right and all(isinstance(a, bool | np.bool_) for a in answer), "on_token(...)", answer, legal)
    return list(map(bool, answer))
