"""Continuing prompts, all at one time: chunk by chunk through the prompts, then one token of every prompt per step.

The slots of the cache are rounded up (`bucket`), so that calls of about the same size share their compiled functions:
each program is compiled once per (batch, slots).
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
from bc2_jax.infer.chunks import PlacedPrompt, make_chunk
from bc2_jax.infer.decoding import Decoding, Emitted, Reason
from bc2_jax.infer.engine import Prepared
from bc2_jax.infer.settings import DEFAULT_SETTINGS, Sampling, Settings, is_whole, sampling_of
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.sharding import parts, to_host, use_mesh_of
from bc2_jax.validation import require, show

_REASONS: dict[int, Literal["eos", "stopped"]] = {Reason.EOS: "eos", Reason.CANCELLED: "stopped"}
OnToken = Callable[[int, list[int | None]], bool | Sequence[bool] | None]
"""Called with the step, from 0, and the new token of each prompt: None for those that have ended.

What it returns may stop prompts: True all of them, a sequence of one bool a prompt those where it is True, None or
False no one. The token just given is then a prompt's last.
"""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What the model wrote after a prompt."""

    tokens: list[int]
    """The eos that ended it included."""
    reason: Literal["eos", "length", "stopped"]
    """Why it ended: at an eos, at max_new_tokens, or because on_token stopped it."""
    log_probs: list[float] | None
    """Of each token, nats: log_softmax of the fp32 logits as the model gave them, before repetition penalty,
    temperature, top_k and top_p; divided by `log_prob_temperature` where that was given. None where they were not asked
    for."""


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
    """The continuation of each prompt: new tokens only, without the eos that ended it.

    `prompts` are token ids, lists or arrays; nothing is added to them. A sequence ends at `eos_token_id`, one id or
    several (by default the config's), or after `max_new_tokens`. temperature 0 is greedy; top_k 0 and top_p 1 cut
    nothing off; a repetition_penalty of 1 does nothing. The defaults are those of the released chat models. Give the
    tokenizer's `vocab_size`, so that no id is chosen that has no text: a model may have more ids than its tokenizer has
    pieces.

    A prompt's continuation depends on its place in the list and the seed, not on the other prompts or the mesh, up to
    the rounding of matmuls of another shape. Works on a model whose parameters are sharded; any number of prompts. A
    model is prepared at every call, beside its own parameters: for several calls, or where memory is short, give what
    `engine.prepare` makes of it.

    `on_token` is called after every step until all have ended, and may stop prompts by what it returns (`OnToken`);
    without it the host waits only for the end. For text in and out, with stop strings, see `infer.text.generate_text`.

    Raises ValueError for no prompts, an empty one, ids of another type or out of range, a prompt that leaves no room
    for max_new_tokens in model_max_length, and settings of another type or out of range.
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
    """`generate` with all that is known of each continuation; the same tokens, arguments and errors."""
    if not isinstance(model, Baichuan2 | Prepared):
        raise ValueError(f"model is a {type(model).__name__}: it must be what load_pretrained or engine.prepare gives.")
    config = model.config
    settings = settings.check(config)
    max_length = model.max_length if isinstance(model, Prepared) else config.model_max_length
    prompts = check_prompts(config, prompts, settings.max_new_tokens, max_length)
    prepared = engine.prepare(model) if isinstance(model, Baichuan2) else model
    with use_mesh_of(prepared.params["norm"]["weight"]):
        rows = batch_rows(len(prompts))
        sampling = sampling_of([settings] * rows, range(rows))
        if log_probs:
            sampling = sampling._replace(top_log_probs=np.zeros(rows, np.int32))
        found = Continuations(rows)
        decoding = _start(prepared, prompts, settings, sampling, found)
        if on_token is None:
            _finish(prepared, decoding, settings.max_new_tokens, found)
        else:
            _finish_with(on_token, prepared, decoding, len(prompts), found)
        return [found.get(row) for row in range(len(prompts))]


def batch_rows(count: int) -> int:
    """Rows of a batch for so many prompts on the mesh in use."""
    return parts("batch") * max(-(-count // parts("batch")), engine.least_rows())


class Continuations:
    """What the rows of a batch have been given so far, on the host."""

    def __init__(self, rows: int):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.reasons = [int(Reason.NO_PROMPT)] * rows
        self._log_probs: list[list[float] | None] = [None] * rows

    def add(self, emitted: Emitted, rows: Sequence[int] | None = None) -> None:
        """What a program chose, its place i being row rows[i] (by default row i); a negative row is no one's."""
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
        """The row gets another prompt."""
        self.tokens[row], self.reasons[row], self._log_probs[row] = [], int(Reason.NO_PROMPT), None

    @property
    def running(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row, reason in enumerate(self.reasons) if reason == Reason.RUNNING]

    def get(self, row: int) -> Continuation:
        """What a row has been given."""
        return Continuation(self.tokens[row], _REASONS.get(self.reasons[row], "length"), self._log_probs[row])


def _start(
    prepared: Prepared, prompts: Sequence[Sequence[int]], settings: Settings, sampling: Sampling, found: Continuations
) -> Decoding:
    """The state after all prompts, and the first token of each."""
    rows, size = len(sampling.place), engine.chunk_length()
    longest = max(map(len, prompts))
    slots = cache_slots(longest + settings.max_new_tokens)
    decoding = engine.allocate(prepared, sampling, slots=slots)
    placed: list[PlacedPrompt | None] = [PlacedPrompt(row, prompt) for row, prompt in enumerate(prompts)]
    placed += [None] * (rows - len(prompts))
    stretches = None
    if prepared.long_context is not None:
        lengths = [0 if at is None else len(at.ids) + settings.max_new_tokens for at in placed]
        stretches = list(map(prepared.stretch, lengths))
    chosen = []
    for start in range(0, longest, size):
        chunk = make_chunk(placed, start, size, slots, stretches)
        decoding, emitted, _ = engine.extend(prepared, decoding, chunk, sampling)
        chosen.append((emitted, [row if is_last else -1 for row, is_last in enumerate(chunk.is_last_R)]))
    for emitted, ended in chosen:
        found.add(emitted, ended)
    return decoding


def _finish(prepared: Prepared, decoding: Decoding, max_new_tokens: int, found: Continuations) -> None:
    """Decodes to the end of all rows; what a program chose is read while the next one runs."""
    nothing = np.zeros(len(decoding.token_B), bool)
    before = None
    for step in range(1, max_new_tokens, engine.STEPS):
        decoding, emitted = engine.decode(prepared, decoding, min(engine.STEPS, max_new_tokens - step), nothing)
        if before is not None:
            found.add(before)
        before = emitted
        if not found.running:
            break
    if before is not None:
        found.add(before)


def _finish_with(on_token: OnToken, prepared: Prepared, decoding: Decoding, count: int, found: Continuations) -> None:
    """The same step by step; `on_token` sees each of them."""
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
    """`length` rounded up: 64, 128, or a multiple of 256."""
    return max(64, 2 ** math.ceil(math.log2(length))) if length <= 128 else -(-length // 256) * 256


def cache_slots(length: int) -> int:
    """Slots of a cache for `length` tokens on the devices in use: 128 or a multiple of 256, at least a chunk."""
    return max(128, bucket(length), engine.chunk_length())


def check_prompts(
    config: ModelConfig, prompts: Any, max_new_tokens: int | Sequence[int], max_length: int | None = None
) -> list[Sequence[int]]:
    """The prompts as they were given; raises ValueError as `generate` for one that is not valid.

    `max_new_tokens` are those of all prompts, or of each; `max_length`, by default the model's trained length, is that
    of a prompt and its new tokens.
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
    """Which of `count` prompts on_token's `answer` stops."""
    if answer is None or isinstance(answer, bool | np.bool_):
        return [bool(answer)] * count
    legal = f"it must return None, a bool, or {count} bools, one a prompt"
    right = isinstance(answer, Sequence | np.ndarray) and len(answer) == count
    require(right and all(isinstance(a, bool | np.bool_) for a in answer), "on_token(...)", answer, legal)
    return list(map(bool, answer))
