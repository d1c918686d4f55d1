"""Continuing prompts, all at one time: one prefill, then one token of every prompt per step, all on the device.

Prompts are padded on the left to one length. Shapes are rounded up (`bucket`), so that calls of about the same size
share their compiled functions: the prefill is compiled once per (batch, prompt bucket, cache bucket), the decode loop
once per (batch, cache bucket).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import ModelConfig
from bc2_jax.infer import engine
from bc2_jax.infer.engine import Decoding, Prepared, Reason
from bc2_jax.infer.sampling import DEFAULT_SETTINGS, Settings, is_whole, sampling_of
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
    prompts = check_prompts(config, prompts, settings.max_new_tokens)
    # So that all greedy calls share one compiled function.
    top_k = 0 if settings.temperature == 0 else settings.top_k
    prepared = engine.prepare(model) if isinstance(model, Baichuan2) else model
    with use_mesh_of(prepared.params["norm"]["weight"]):
        ids_BT, segments_BT = _pad_prompts(prompts, parts("batch"), config.pad_token_id)
        batch, length = len(ids_BT), bucket(ids_BT.shape[1] + settings.max_new_tokens)
        sampling = sampling_of([settings] * batch, range(batch))
        decoding = engine.prefill(
            prepared, ids_BT, segments_BT, sampling, length=length, top_k=top_k, log_probs=log_probs
        )
        if on_token is None:
            decoding = engine.decode(prepared, decoding, top_k=top_k, steps=settings.max_new_tokens)
        else:
            for step in range(settings.max_new_tokens):
                if step:
                    decoding = engine.decode(prepared, decoding, top_k=top_k, steps=1)
                tokens = _new_tokens(decoding, step)[: len(prompts)]
                if all(token is None for token in tokens):
                    break
                decoding = _stop(decoding, on_token(step, tokens), len(prompts))
        return _continuations(decoding)[: len(prompts)]


def bucket(length: int) -> int:
    """`length` rounded up: 64, 128, 256, then multiples of 256."""
    return max(64, 2 ** math.ceil(math.log2(length))) if length <= 256 else -(-length // 256) * 256


def check_prompts(config: ModelConfig, prompts: Any, max_new_tokens: int | Sequence[int]) -> list[Sequence[int]]:
    """The prompts as they were given; raises ValueError as `generate` for one that is not valid.

    `max_new_tokens` are those of all prompts, or of each.
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
        if len(prompt) + limit > config.model_max_length:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, which with max_new_tokens = {limit} is more than "
                f"model_max_length = {config.model_max_length}."
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


def _pad_prompts(
    prompts: Sequence[Sequence[int]], batch_multiple: int, pad_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments int32 [B, T]: tokens on the right with segment 1, padding and rows of no prompt segment 0."""
    batch = -(-len(prompts) // batch_multiple) * batch_multiple
    ids_BT = np.full((batch, bucket(max(map(len, prompts)))), pad_token_id, np.int32)
    segments_BT = np.zeros_like(ids_BT)
    for i, prompt in enumerate(prompts):
        ids_BT[i, -len(prompt) :] = prompt
        segments_BT[i, -len(prompt) :] = 1
    return ids_BT, segments_BT


def _new_tokens(decoding: Decoding, step: int) -> list[int | None]:
    """The token of each row that was chosen in this step; None for the eos and for rows that had ended."""
    token_B, step_B, reason_B = (to_host(x) for x in (decoding.token_B, decoding.step_B, decoding.reason_B))
    is_text_B = (step_B == step + 1) & (reason_B != Reason.EOS)
    return [int(token) if is_text else None for token, is_text in zip(token_B, is_text_B, strict=True)]


def _stop(decoding: Decoding, answer: Any, count: int) -> Decoding:
    """`decoding` without the rows that on_token's `answer` stops."""
    if answer is None or answer is False:
        return decoding
    stops = np.zeros(len(decoding.step_B), bool)
    if answer is True:
        stops[:] = True
    else:
        legal = f"it must return None, a bool, or {count} bools, one a prompt"
        right = isinstance(answer, Sequence | np.ndarray) and len(answer) == count
        require(right and all(isinstance(a, bool | np.bool_) for a in answer), "on_token(...)", answer, legal)
        stops[:count] = answer
    runs_B = to_host(decoding.reason_B) == Reason.RUNNING
    reason_B = jnp.where(stops & runs_B, np.int8(Reason.CANCELLED), decoding.reason_B)
    return decoding._replace(reason_B=reason_B)


def _continuations(decoding: Decoding) -> list[Continuation]:
    rows = range(len(decoding.step_B))
    return read_rows(decoding, rows, to_host(decoding.step_B), to_host(decoding.reason_B))


def read_rows(decoding: Decoding, rows: Sequence[int], step_B: np.ndarray, reason_B: np.ndarray) -> list[Continuation]:
    """What `rows` of `decoding` hold; its step_B and reason_B are already on the host."""
    output_BS = to_host(decoding.output_BS)
    log_probs_BS = None if decoding.log_probs_BS is None else to_host(decoding.log_probs_BS)
    return [
        Continuation(
            tokens=output_BS[row, : step_B[row]].tolist(),
            reason=_REASONS.get(reason_B[row], "length"),
            log_probs=None if log_probs_BS is None else log_probs_BS[row, : step_B[row]].tolist(),
        )
        for row in rows
    ]
