"""The device programs of generation: prompt chunks, decoding steps and copies of cache slots.

`allocate` makes an empty batch state, `extend` runs prompt chunks and samples the first token of prompts that end,
`decode` generates more tokens, `copy_slots` copies a shared prompt prefix from one row to another, and `score_chunk`
returns log-probabilities of prompt tokens. Each program is compiled once per batch and chunk shape, whatever the
prompts.

A row's results depend only on its own tokens, settings, seed and place, bit for bit, while the shapes stay the same:
not on other rows, its row index, or programs that run between its chunks. The number of cache slots may change, and on
a CPU so may the number of rows, from `least_rows()` up.

All functions work with or without a mesh and move host arrays to the device explicitly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import ComputeConfig
from bc2_jax.infer.decoding import (
    STEPS,
    Chunk,
    Decoding,
    Emitted,
    LogProbs,
    Reason,
    by_rows,
    init_cache,
    replicate,
    sampling_axis,
)
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.prepared import prepare as prepare  # part of this module's interface
from bc2_jax.infer.sampling import MOST_TOP_LOG_PROBS, chosen_log_probs, next_token, top_log_probs
from bc2_jax.infer.settings import Sampling
from bc2_jax.kernels.cached import KVCache, Place, copy_chunks
from bc2_jax.model.attention import CACHE_AXES
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.sharding import (
    ShardingRules,
    current_chip,
    from_host,
    named_sharding,
    platform,
    reshard,
    rules_in_use,
    spec,
    use_mesh_of,
    use_rules,
)
from bc2_jax.tpu.options import Value, compiler_options

SCORED = 32
"""Tokens whose logits are in memory at once while prompts are scored."""


class Programs(NamedTuple):
    """The jitted functions. Call them with `decoding_rules()` and the mesh in use, and with device arrays.

    allocate(prepared, sampling, slots=), extend(prepared, decoding, chunk, sampling), decode(prepared, decoding, steps,
    cancel_B), copy_slots(decoding, row_from, row_to, chunks, size=), score(prepared, h_RCD, labels_RC).
    """

    allocate: Any
    extend: Any
    decode: Any
    copy_slots: Any
    score: Any


def chunk_length() -> int:
    """Prompt tokens per `extend` on the current devices. It divides the slots of every cache.

    On a TPU, reading the weights takes as long as computing 256 tokens; on a CPU, short prompts should waste little
    work.
    """
    return 64 if platform() == "cpu" else 256


def least_rows() -> int:
    """Smallest number of rows per batch shard on the current devices.

    On a CPU a matmul of one row takes another code path and gives other bits than one of two or more rows.
    """
    return 2 if platform() == "cpu" else 1


def allocate(prepared: Prepared, sampling: Sampling, *, slots: int) -> Decoding:
    """An empty batch state with one row per entry of `sampling` and a cache of `slots` slots.

    Settings that are None in `sampling` must be None for every later prompt. `slots` is a multiple of 128 and of
    `chunk_length()`.
    """
    weight = prepared.params["norm"]["weight"]
    with _runs_on(weight):
        decoding = make_programs().allocate(prepared, from_host(sampling), slots=slots)
    if isinstance(weight, Array) and isinstance(weight.sharding, jax.sharding.SingleDeviceSharding):
        # Commit it to the parameters' device, as `extend` does with its result: otherwise `extend` compiles twice.
        decoding = jax.device_put(decoding, weight.sharding)
    return decoding


def extend(prepared: Prepared, decoding: Decoding, chunk: Chunk, sampling: Sampling) -> tuple[Decoding, Emitted, Array]:
    """Runs one chunk of R prompts with the settings `sampling` of its R places. Donates `decoding`.

    A prompt that ends in this chunk gets its first new token, and its row the settings. Also returns the chunk's hidden
    states [R, C, D] for `score_chunk`.
    """
    with _runs_on(prepared.params["norm"]["weight"]):
        return programs(prepared.compute).extend(prepared, decoding, *from_host((chunk, sampling)))


def decode(prepared: Prepared, decoding: Decoding, steps: int, cancel_B: np.ndarray) -> tuple[Decoding, Emitted]:
    """Generates up to `steps` (1..STEPS) tokens for each running row; stops early when none runs. Donates `decoding`.

    Running rows with True in the bool `cancel_B` are cancelled first.
    """
    assert 1 <= steps <= STEPS, steps
    with _runs_on(prepared.params["norm"]["weight"]):
        return programs(prepared.compute).decode(prepared, decoding, *from_host((np.int32(steps), cancel_B)))


def copy_slots(decoding: Decoding, row_from: int, row_to: int, chunks: int, size: int) -> Decoding:
    """Copies the first `chunks` * `size` cache slots of one row to another row of the same batch shard. Donates
    `decoding`.

    The target row then has that many slots in use and no prompt.
    """
    with _runs_on(decoding.cache.k):
        numbers = from_host(tuple(np.int32(x) for x in (row_from, row_to, chunks)))
        return make_programs().copy_slots(decoding, *numbers, size=size)


def score_chunk(prepared: Prepared, h_RCD: Array, labels_RC: np.ndarray) -> LogProbs:
    """Log-probabilities of the token after each token of a chunk, and of the most likely tokens there."""
    with _runs_on(prepared.params["norm"]["weight"]):
        return programs(prepared.compute).score(prepared, h_RCD, from_host(labels_RC))


def decoding_rules() -> ShardingRules:
    """The current sharding rules without a sharded sequence axis, under which the programs run.

    A single new token cannot be sharded: devices that share a sequence each compute all of it and split only the
    attention heads.
    """
    return dataclasses.replace(rules_in_use(), sequence=None)


@contextlib.contextmanager
def _runs_on(x: Array) -> Iterator[None]:
    with use_mesh_of(x), use_rules(decoding_rules()):
        yield


# ------------------------------------------------------------------------------------------------------- the programs


def _run_allocate(prepared: Prepared, sampling: Sampling, *, slots: int) -> Decoding:
    B, V = len(sampling.place), prepared.config.vocab_size
    counts = sampling.presence_penalty is not None or sampling.frequency_penalty is not None
    return Decoding(
        cache=init_cache(prepared.config, prepared.compute, B, slots, prepared.kv),
        length_B=jnp.zeros(B, jnp.int32),
        seen_BV=reshard(jnp.zeros((B, V), bool), sampling_axis(B), None),
        counts_BV=reshard(jnp.zeros((B, V), jnp.int16), sampling_axis(B), None) if counts else None,
        token_B=jnp.zeros(B, jnp.int32),
        step_B=jnp.zeros(B, jnp.int32),
        reason_B=jnp.full(B, Reason.NO_PROMPT, jnp.int8),
        # Host arrays have no sharding yet.
        sampling=replicate(sampling),
        stretch_B=jnp.ones(B, jnp.float32) if prepared.long_context is not None else None,
    )


def _run_extend(
    prepared: Prepared, decoding: Decoding, chunk: Chunk, sampling: Sampling
) -> tuple[Decoding, Emitted, Array]:
    model, V, B = prepared.merge(), prepared.config.vocab_size, len(decoding.token_B)
    has_R = chunk.count_R > 0
    starts_R = has_R & chunk.is_last_R
    place = Place(chunk.rows_R, jnp.where(has_R, chunk.start_R, -1))
    h_RCD, cache = model.extend(chunk.ids_RC, place, decoding.cache, chunk.stretch_R, prepared.method)

    def last_two(h_RCD: Array, count_R: Array) -> Array:
        # Two tokens: with R = 1 the last alone would be a one-row matmul, which has other bits on a CPU.
        last_R = jnp.maximum(count_R - 1, 0)
        return jnp.take_along_axis(h_RCD, jnp.stack([last_R, jnp.maximum(last_R - 1, 0)], axis=1)[..., None], axis=1)

    def mark_seen(prompt_RS: Array) -> Array:
        mark = jax.vmap(lambda ids: jnp.zeros(V, bool).at[ids].set(True, mode="drop"))
        return mark(jnp.where(prompt_RS < 0, V, prompt_RS))

    seen_RV = by_rows(mark_seen, chunk.prompt_RS, axes=sampling_axis(len(chunk.rows_R)))
    counts_RV = None if decoding.counts_BV is None else jnp.zeros_like(seen_RV, jnp.int16)
    step_R = jnp.zeros_like(chunk.count_R)
    logits_R2V = model.lm_head(by_rows(last_two, h_RCD, chunk.count_R))
    token_R, seen_RV, counts_RV, log_probs = _choose(logits_R2V, seen_RV, counts_RV, step_R, starts_R, sampling)
    step_R += 1
    reason_R = jnp.where(starts_R, _reason(token_R, step_R, sampling), Reason.NO_PROMPT).astype(jnp.int8)
    tokens_RK = jnp.where(starts_R, token_R, -1)[:, None]
    log_probs = None if log_probs is None else LogProbs(*(x[:, None] for x in log_probs))
    emitted = replicate(Emitted(tokens_RK, log_probs, jnp.where(starts_R, step_R, 0), reason_R))

    def put(old: Any, new: Any, rows_R: Array) -> Any:
        return jax.tree.map(lambda old, new: old.at[rows_R].set(new, mode="drop"), old, new)

    def put_cut(old: Any, own_B: Array, new: Any, rows_R: Array, starts_R: Array) -> Any:
        row_R = rows_R - own_B[0]
        return put(old, new, jnp.where(starts_R & (row_R >= 0), row_R, len(own_B)))

    used_R, begun_R = (jnp.where(x, chunk.rows_R, B) for x in (has_R, starts_R))
    seen_BV, counts_BV = by_rows(
        put_cut, (decoding.seen_BV, decoding.counts_BV), jnp.arange(B), (seen_RV, counts_RV), chunk.rows_R, starts_R,
        axes=(sampling_axis(B), sampling_axis(B), "batch", "batch", "batch"),
    )  # fmt: skip
    small = (decoding.token_B, decoding.step_B, decoding.reason_B, decoding.sampling, decoding.stretch_B)
    new = (token_R, step_R, reason_R, sampling, chunk.stretch_R)
    token_B, step_B, reason_B, settings, stretch_B = put(small, replicate(new), begun_R)
    decoding = Decoding(
        cache, put(decoding.length_B, chunk.start_R + chunk.count_R, used_R), seen_BV, counts_BV, token_B, step_B,
        # Until its whole prompt has run, a row has no prompt.
        jnp.where(_is_in(B, used_R) & ~_is_in(B, begun_R), Reason.NO_PROMPT, reason_B).astype(jnp.int8), settings,
        stretch_B,
    )  # fmt: skip
    return decoding, emitted, h_RCD


def _is_in(B: int, rows_R: Array) -> Array:
    """bool [B]: True for rows listed in `rows_R`."""
    return (jnp.arange(B)[:, None] == rows_R).any(axis=1)


def _run_decode(prepared: Prepared, decoding: Decoding, steps: Array, cancel_B: Array) -> tuple[Decoding, Emitted]:
    model, B = prepared.merge(), len(decoding.token_B)
    reason_B = jnp.where(cancel_B & (decoding.reason_B == Reason.RUNNING), Reason.CANCELLED, decoding.reason_B)
    decoding = decoding._replace(reason_B=reason_B.astype(jnp.int8))
    log_probs = None
    if decoding.sampling.top_log_probs is not None:
        zeros = jnp.zeros((B, STEPS, MOST_TOP_LOG_PROBS), jnp.float32)
        log_probs = LogProbs(zeros[..., 0], jnp.zeros_like(zeros, jnp.int32), zeros)
    chosen = (jnp.full((B, STEPS), -1, jnp.int32), log_probs)

    def runs(carry: tuple[Array, Decoding, Any]) -> Array:
        done, decoding, _ = carry
        return (done < steps) & jnp.any(decoding.reason_B == Reason.RUNNING)

    def step(carry: tuple[Array, Decoding, Any]) -> tuple[Array, Decoding, Any]:
        done, decoding, chosen = carry
        decoding, new = _decode_step(model, prepared.method, decoding)
        chosen = jax.tree.map(lambda all_BK, new_B: all_BK.at[:, done].set(new_B), chosen, new)
        return done + 1, decoding, chosen

    _, decoding, (tokens_BK, log_probs) = jax.lax.while_loop(
        runs, step, (jnp.zeros((), jnp.int32), decoding, replicate(chosen))
    )
    # Copies, because the next program donates the state.
    return decoding, Emitted(tokens_BK, log_probs, decoding.step_B + 0, decoding.reason_B + jnp.int8(0))


def _decode_step(model: Baichuan2, method: str, decoding: Decoding) -> tuple[Decoding, tuple[Array, LogProbs | None]]:
    """One more token for each running row. Returns the tokens, -1 for rows that are not running but compute along."""
    length_B, S = decoding.length_B, decoding.cache.k.shape[3]
    was_running_B = decoding.reason_B == Reason.RUNNING
    runs_B = was_running_B & (length_B < S)
    place = Place(jnp.arange(len(length_B)), jnp.where(runs_B, length_B, -1))
    h_BTD, cache = model.extend(decoding.token_B[:, None], place, decoding.cache, decoding.stretch_B, method)
    token_B, seen_BV, counts_BV, log_probs = _choose(
        model.lm_head(h_BTD), decoding.seen_BV, decoding.counts_BV, decoding.step_B, runs_B, decoding.sampling
    )
    step_B = decoding.step_B + runs_B
    reason_B = jnp.where(runs_B, _reason(token_B, step_B, decoding.sampling), decoding.reason_B)
    reason_B = jnp.where(was_running_B & ~runs_B, Reason.LIMIT, reason_B).astype(jnp.int8)
    new_token_B = jnp.where(runs_B, token_B, decoding.token_B)
    decoding = decoding._replace(
        cache=cache, length_B=length_B + runs_B, seen_BV=seen_BV, counts_BV=counts_BV, token_B=new_token_B,
        step_B=step_B, reason_B=reason_B,
    )  # fmt: skip
    return decoding, (jnp.where(runs_B, token_B, -1), log_probs)


def _choose(
    logits_B1V: Array, seen_BV: Array, counts_BV: Array | None, step_B: Array, runs_B: Array, sampling: Sampling
) -> tuple[Array, Array, Array | None, LogProbs | None]:
    """Samples the next token of each row from logits [B, 1, V] and marks it as seen for running rows."""

    def choose(logits_BV, seen_BV, counts_BV, step_B, runs_B, sampling):
        token_B = next_token(logits_BV, seen_BV, counts_BV, step_B, sampling)
        log_probs = None
        if sampling.top_log_probs is not None:
            chosen_B = chosen_log_probs(logits_BV, token_B, sampling.log_prob_temperature)
            log_probs = LogProbs(chosen_B, *top_log_probs(logits_BV, sampling.top_log_probs > 0))
        at = (jnp.arange(len(token_B)), jnp.where(runs_B, token_B, logits_BV.shape[1]))
        seen_BV = seen_BV.at[at].set(True, mode="drop")
        if counts_BV is not None:
            counts_BV = counts_BV.at[at].add(jnp.int16(1), mode="drop")
        return (seen_BV, counts_BV), (token_B, log_probs)

    with jax.named_scope("sample"):
        # Each device gets the whole vocabulary of its own rows: 0.5 MB per row and token.
        axis, rows = sampling_axis(len(step_B)), (seen_BV, counts_BV, step_B, runs_B, sampling)
        (seen_BV, counts_BV), drawn = by_rows(choose, reshard(logits_B1V[:, 0], axis, None), *rows, axes=axis)
        token_B, log_probs = replicate(drawn)
    return token_B, seen_BV, counts_BV, log_probs


def _reason(token_B: Array, step_B: Array, sampling: Sampling) -> Array:
    is_eos_B = (token_B[:, None] == sampling.eos_token_id).any(axis=1)
    return jnp.where(is_eos_B, Reason.EOS, jnp.where(step_B >= sampling.limit, Reason.LIMIT, Reason.RUNNING))


def _run_copy_slots(decoding: Decoding, row_from: Array, row_to: Array, chunks: Array, *, size: int) -> Decoding:
    def copy(cache: KVCache, own_B: Array, row_from: Array, row_to: Array, chunks: Array) -> KVCache:
        here_from, here_to = (jnp.clip(row - own_B[0], 0, len(own_B) - 1) for row in (row_from, row_to))
        return copy_chunks(cache, here_from, here_to, chunks, size, here_to == row_to - own_B[0])

    own_B = reshard(jnp.arange(len(decoding.token_B)), "batch")
    arguments = (decoding.cache, own_B, *replicate((row_from, row_to, chunks)))
    if named_sharding() is not None:
        slots = jax.tree.map(lambda _: spec(*CACHE_AXES), decoding.cache)
        in_specs = (slots, spec("batch"), spec(), spec(), spec())
        copy = jax.shard_map(copy, in_specs=in_specs, out_specs=slots)  # type: ignore[assignment]  # what jax declares
    is_row_B = jnp.arange(len(decoding.token_B)) == row_to
    return decoding._replace(
        cache=copy(*arguments),
        length_B=jnp.where(is_row_B, chunks * size, decoding.length_B),
        reason_B=jnp.where(is_row_B, Reason.NO_PROMPT, decoding.reason_B).astype(jnp.int8),
    )


def _run_score(prepared: Prepared, h_RCD: Array, labels_RC: Array) -> LogProbs:
    model = prepared.merge()
    R, C, D = h_RCD.shape
    size = min(SCORED, C)

    def score(part: tuple[Array, Array]) -> LogProbs:
        h_RTD, labels_RT = part

        def score_rows(logits_RTV: Array, labels_RT: Array) -> LogProbs:
            logits_BV, labels_B = logits_RTV.reshape(-1, logits_RTV.shape[-1]), labels_RT.reshape(-1)
            found = (
                chosen_log_probs(logits_BV, labels_B, None),
                *top_log_probs(logits_BV, jnp.ones_like(labels_B, bool)),
            )
            return LogProbs(*(x.reshape(*labels_RT.shape, *x.shape[1:]) for x in found))

        logits_RTV = model.lm_head(h_RTD)
        return replicate(by_rows(score_rows, reshard(logits_RTV, "batch", None, None), labels_RT))

    cuts = [h_RCD[:, i : i + size] for i in range(0, C, size)]
    found = [score((h, labels_RC[:, i * size : (i + 1) * size])) for i, h in enumerate(cuts)]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *found)


def programs(compute: ComputeConfig) -> Programs:
    """The programs, on a TPU with the compiler options of `compute`.

    On a CPU two XLA features would make a row's bits depend on the batch size: sums in YNNPACK, used for large arrays
    only, and skipped bfloat16 rounding inside fusions. Both are off.
    """
    chip = current_chip()
    if chip is not None and compute.compiler_options != "default":
        return make_programs(**compiler_options(chip, inference=True))
    if platform() == "cpu":
        return make_programs(
            xla_cpu_experimental_ynn_fusion_type="LIBRARY_FUSION_TYPE_DOT", xla_allow_excess_precision=False
        )
    return make_programs()


@functools.cache
def make_programs(**options: Value) -> Programs:
    """The programs, jitted once per set of compiler options; `allocate` and `copy_slots` take none."""
    return Programs(
        allocate=jax.jit(_run_allocate, static_argnames="slots"),
        extend=jax.jit(_run_extend, donate_argnums=1, compiler_options=options),
        decode=jax.jit(_run_decode, donate_argnums=1, compiler_options=options),
        copy_slots=jax.jit(_run_copy_slots, static_argnames="size", donate_argnums=0),
        score=jax.jit(_run_score, compiler_options=options),
    )
