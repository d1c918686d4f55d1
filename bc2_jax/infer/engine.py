"""What generation does on the device: chunks of prompts, decoding steps and copies of slots, each one program.

`allocate` makes the empty state of a batch; `extend` runs chunks of prompts into rows of it, and chooses the first
token of those that end there; `decode` gives each row that runs some tokens more; `copy_slots` gives a row what another
has of the same prompt. Shapes are those of batch and chunk, whatever the prompts: each program is compiled once.

What is computed for a row depends on its tokens, settings, seed and place alone, to the last bit, as long as the shapes
stay: not on the other rows, nor on which row it is, nor on what runs between its chunks. The slots of the cache may
change, and on a CPU the numbers of rows as well, from `least_rows()` on.

All work with any mesh and without one, and move the arrays of the host explicitly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import ComputeConfig
from bc2_jax.infer.cache import init_cache
from bc2_jax.infer.decoding import STEPS, Chunk, Decoding, Emitted, LogProbs, Reason
from bc2_jax.infer.prepared import Prepared, prepare
from bc2_jax.infer.sampling import MOST_TOP_LOG_PROBS, chosen_log_probs, next_token, top_log_probs
from bc2_jax.infer.settings import Sampling
from bc2_jax.kernels.blocks import current_chip
from bc2_jax.kernels.cached import KVCache, Place, copy_chunks
from bc2_jax.model.attention import CACHE_AXES
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.sharding import (
    ShardingRules,
    from_host,
    named_sharding,
    parts,
    platform,
    reshard,
    rules_in_use,
    spec,
    use_mesh_of,
    use_rules,
)
from bc2_jax.tpu.options import Value, compiler_options

__all__ = [
    "Chunk", "Decoding", "Emitted", "LogProbs", "Prepared", "Programs", "Reason", "STEPS", "allocate", "chunk_length",
    "copy_slots", "decode", "decoding_rules", "extend", "least_rows", "make_programs", "prepare", "programs",
    "score_chunk",
]  # fmt: skip

SCORED = 32
"""Tokens whose logits are in memory at once where prompts are scored."""


class Programs(NamedTuple):
    """The jitted functions; to run with `decoding_rules()` and the mesh in use, and arrays of the device.

    allocate(prepared, sampling, slots=), extend(prepared, decoding, chunk, sampling), decode(prepared,
    decoding, steps, cancel_B), copy_slots(decoding, row_from, row_to, chunks, size=), score(prepared, h_RCD,
    labels_RC).
    """

    allocate: Any
    extend: Any
    decode: Any
    copy_slots: Any
    score: Any


def chunk_length() -> int:
    """Tokens of a prompt that one `extend` runs, on the devices in use. It divides the slots of every cache.

    On a TPU reading the weights takes as long as 256 tokens compute; on a CPU small prompts should waste little.
    """
    return 64 if platform() == "cpu" else 256


def least_rows() -> int:
    """Rows of a chunk or a batch that each part of the mesh should have, on the devices in use.

    On a CPU matmuls of a single row take another path and give other bits than those of two or more.
    """
    return 2 if platform() == "cpu" else 1


def allocate(prepared: Prepared, sampling: Sampling, *, slots: int) -> Decoding:
    """Rows of no prompt with an empty cache of `slots` slots, one for each of `sampling`.

    The settings that are None in `sampling` must be None in those of every prompt. `slots` is a multiple of 128, and of
    `chunk_length()`.
    """
    weight = prepared.params["norm"]["weight"]
    with _runs_on(weight):
        decoding = make_programs().allocate(prepared, from_host(sampling), slots=slots)
    if isinstance(weight, Array) and isinstance(weight.sharding, jax.sharding.SingleDeviceSharding):
        # Committed, as what `extend` returns is where the parameters are: else its second call would compile again.
        decoding = jax.device_put(decoding, weight.sharding)
    return decoding


def extend(prepared: Prepared, decoding: Decoding, chunk: Chunk, sampling: Sampling) -> tuple[Decoding, Emitted, Array]:
    """Runs one chunk of R prompts; `sampling` are the settings of its R places. `decoding` is used up.

    The row of a prompt that ends has its first new token, and the settings, afterwards. Returns also the hidden states
    [R, C, D] of the chunk, for `score_chunk`.
    """
    with _runs_on(prepared.params["norm"]["weight"]):
        return programs(prepared.compute).extend(prepared, decoding, *from_host((chunk, sampling)))


def decode(prepared: Prepared, decoding: Decoding, steps: int, cancel_B: np.ndarray) -> tuple[Decoding, Emitted]:
    """At most `steps` tokens more, up to STEPS, of each row that runs; ends early when none does.

    The rows where bool `cancel_B` is True are cancelled first, if they run. `decoding` is used up.
    """
    assert 1 <= steps <= STEPS, steps
    with _runs_on(prepared.params["norm"]["weight"]):
        return programs(prepared.compute).decode(prepared, decoding, *from_host((np.int32(steps), cancel_B)))


def copy_slots(decoding: Decoding, row_from: int, row_to: int, chunks: int, size: int) -> Decoding:
    """The first `chunks` * `size` slots of one row over those of another in the same part of the batch.

    The row has no prompt then, and as many slots in use. `decoding` is used up.
    """
    with _runs_on(decoding.cache.k):
        numbers = from_host(tuple(np.int32(x) for x in (row_from, row_to, chunks)))
        return make_programs().copy_slots(decoding, *numbers, size=size)


def score_chunk(prepared: Prepared, h_RCD: Array, labels_RC: np.ndarray) -> LogProbs:
    """Log-probabilities of the tokens that follow those of a chunk, and the most likely ones."""
    with _runs_on(prepared.params["norm"]["weight"]):
        return programs(prepared.compute).score(prepared, h_RCD, from_host(labels_RC))


def decoding_rules() -> ShardingRules:
    """The rules in use, changed to what the programs run under.

    One new token cannot be cut: the devices that share a sequence each work on the whole of it, and share only the
    heads of attention.
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
        # Arrays of the host have no layout until they are given one.
        sampling=_whole(sampling),
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
        # The last alone would be the only row of the head's matmul where R = 1, which has other bits on a CPU.
        last_R = jnp.maximum(count_R - 1, 0)
        return jnp.take_along_axis(h_RCD, jnp.stack([last_R, jnp.maximum(last_R - 1, 0)], axis=1)[..., None], axis=1)

    def mark_seen(prompt_RS: Array) -> Array:
        mark = jax.vmap(lambda ids: jnp.zeros(V, bool).at[ids].set(True, mode="drop"))
        return mark(jnp.where(prompt_RS < 0, V, prompt_RS))

    seen_RV = _by_rows(mark_seen, chunk.prompt_RS, axes=sampling_axis(len(chunk.rows_R)))
    counts_RV = None if decoding.counts_BV is None else jnp.zeros_like(seen_RV, jnp.int16)
    step_R = jnp.zeros_like(chunk.count_R)
    logits_R2V = model.lm_head(_by_rows(last_two, h_RCD, chunk.count_R))
    token_R, seen_RV, counts_RV, log_probs = _choose(logits_R2V, seen_RV, counts_RV, step_R, starts_R, sampling)
    step_R += 1
    reason_R = jnp.where(starts_R, _reason(token_R, step_R, sampling), Reason.NO_PROMPT).astype(jnp.int8)
    tokens_RK = jnp.where(starts_R, token_R, -1)[:, None]
    log_probs = None if log_probs is None else LogProbs(*(x[:, None] for x in log_probs))
    emitted = _whole(Emitted(tokens_RK, log_probs, jnp.where(starts_R, step_R, 0), reason_R))

    def put(old: Any, new: Any, rows_R: Array) -> Any:
        return jax.tree.map(lambda old, new: old.at[rows_R].set(new, mode="drop"), old, new)

    def put_cut(old: Any, own_B: Array, new: Any, rows_R: Array, starts_R: Array) -> Any:
        row_R = rows_R - own_B[0]
        return put(old, new, jnp.where(starts_R & (row_R >= 0), row_R, len(own_B)))

    used_R, begun_R = (jnp.where(x, chunk.rows_R, B) for x in (has_R, starts_R))
    seen_BV, counts_BV = _by_rows(
        put_cut, (decoding.seen_BV, decoding.counts_BV), jnp.arange(B), (seen_RV, counts_RV), chunk.rows_R, starts_R,
        axes=(sampling_axis(B), sampling_axis(B), "batch", "batch", "batch"),
    )  # fmt: skip
    small = (decoding.token_B, decoding.step_B, decoding.reason_B, decoding.sampling, decoding.stretch_B)
    new = (token_R, step_R, reason_R, sampling, chunk.stretch_R)
    token_B, step_B, reason_B, settings, stretch_B = put(small, _whole(new), begun_R)
    decoding = Decoding(
        cache, put(decoding.length_B, chunk.start_R + chunk.count_R, used_R), seen_BV, counts_BV, token_B, step_B,
        # Until its prompt ends a row has none: what was there before is over.
        jnp.where(_is_in(B, used_R) & ~_is_in(B, begun_R), Reason.NO_PROMPT, reason_B).astype(jnp.int8), settings,
        stretch_B,
    )  # fmt: skip
    return decoding, emitted, h_RCD


def _is_in(B: int, rows_R: Array) -> Array:
    """bool [B]: the rows that are named."""
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
        runs, step, (jnp.zeros((), jnp.int32), decoding, _whole(chosen))
    )
    # Copies: the state is consumed by the next program.
    return decoding, Emitted(tokens_BK, log_probs, decoding.step_B + 0, decoding.reason_B + jnp.int8(0))


def _decode_step(model: Baichuan2, method: str, decoding: Decoding) -> tuple[Decoding, tuple[Array, LogProbs | None]]:
    """One token more of each row that runs, and the tokens, -1 for the others, which compute along."""
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
    """Draws the next token of each row from logits [B, 1, V]; what was seen and counted has those of rows that run."""

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
        # Each device takes the whole vocabulary of its own rows: 0.5 MB a row, once per token.
        axis, rows = sampling_axis(len(step_B)), (seen_BV, counts_BV, step_B, runs_B, sampling)
        (seen_BV, counts_BV), drawn = _by_rows(choose, reshard(logits_B1V[:, 0], axis, None), *rows, axes=axis)
        token_B, log_probs = _whole(drawn)
    return token_B, seen_BV, counts_BV, log_probs


def _reason(token_B: Array, step_B: Array, sampling: Sampling) -> Array:
    """Why a row that has this token as its newest one has ended, or that it runs."""
    is_eos_B = (token_B[:, None] == sampling.eos_token_id).any(axis=1)
    return jnp.where(is_eos_B, Reason.EOS, jnp.where(step_B >= sampling.limit, Reason.LIMIT, Reason.RUNNING))


def _run_copy_slots(decoding: Decoding, row_from: Array, row_to: Array, chunks: Array, *, size: int) -> Decoding:
    def copy(cache: KVCache, own_B: Array, row_from: Array, row_to: Array, chunks: Array) -> KVCache:
        here_from, here_to = (jnp.clip(row - own_B[0], 0, len(own_B) - 1) for row in (row_from, row_to))
        return copy_chunks(cache, here_from, here_to, chunks, size, here_to == row_to - own_B[0])

    own_B = reshard(jnp.arange(len(decoding.token_B)), "batch")
    arguments = (decoding.cache, own_B, *_whole((row_from, row_to, chunks)))
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
        return _whole(_by_rows(score_rows, reshard(logits_RTV, "batch", None, None), labels_RT))

    cuts = [h_RCD[:, i : i + size] for i in range(0, C, size)]
    found = [score((h, labels_RC[:, i * size : (i + 1) * size])) for i, h in enumerate(cuts)]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *found)


def sampling_axis(rows: int) -> str:
    """How the rows of a batch are cut where tokens are drawn: over all devices, if there are as many for each."""
    return "batch" if rows % parts("sampling") else "sampling"


def _by_rows(function: Callable, *trees: Any, axes: str | Sequence[str] = "batch") -> Any:
    """function(*trees) on each device's own rows, which come first in every array of `trees` and of the result.

    `axes` are the logical axes of the rows, of all or of each of `trees`; the result is cut as the first.
    """
    axes = [axes] * len(trees) if isinstance(axes, str) else axes
    trees = tuple(
        jax.tree.map(lambda x, axis=axis: reshard(x, axis, *[None] * (x.ndim - 1)), tree)
        for axis, tree in zip(axes, trees, strict=True)
    )
    if named_sharding() is None:
        return function(*trees)
    return jax.shard_map(function, in_specs=tuple(map(spec, axes)), out_specs=spec(axes[0]))(*trees)


def _whole(tree: Any) -> Any:
    """The arrays of `tree`, whole on every device."""
    return jax.tree.map(lambda x: reshard(jnp.asarray(x), *[None] * jnp.ndim(x)), tree)


def programs(compute: ComputeConfig) -> Programs:
    """The programs, on a TPU with the compiler options that `compute` chooses.

    On a CPU a row would get other bits in a batch of another size where XLA hands its sums to YNNPACK, which it does
    for large ones, and where it leaves out the rounding to bfloat16 between operations that it fuses.
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
    """The programs, jitted once for these compiler options; to allocate and to copy needs none."""
    return Programs(
        allocate=jax.jit(_run_allocate, static_argnames="slots"),
        extend=jax.jit(_run_extend, donate_argnums=1, compiler_options=options),
        decode=jax.jit(_run_decode, donate_argnums=1, compiler_options=options),
        copy_slots=jax.jit(_run_copy_slots, static_argnames="size", donate_argnums=0),
        score=jax.jit(_run_score, compiler_options=options),
    )
