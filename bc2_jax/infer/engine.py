"""What generation does on the device: prefill of prompts, insertion into a running batch, decoding, each one program.

A row of the batch has its own length, settings, step and end, so rows may start and end at different times. `prefill`
makes a `Decoding` of prompts, with a model that `prepare` has laid out; `decode` gives each of its rows some tokens
more; `insert` copies rows of one `Decoding` into another, over rows that have ended or were cancelled; `allocate` makes
one without prompts. All work with any mesh and without one, and move the arrays of the host explicitly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import ComputeConfig
from bc2_jax.infer.cache import init_cache
from bc2_jax.infer.prepared import Prepared, prepare
from bc2_jax.infer.sampling import Sampling, mask_absent, penalize_repetition, row_keys, sample_tokens
from bc2_jax.kernels.attention import Tokens
from bc2_jax.kernels.blocks import current_chip
from bc2_jax.model.attention import CACHE_AXES, KVCache
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.sharding import (
    ShardingRules,
    from_host,
    named_sharding,
    reshard,
    rules_in_use,
    spec,
    use_mesh_of,
    use_rules,
)
from bc2_jax.tpu.options import Value, compiler_options

__all__ = [
    "Decoding", "Prepared", "Programs", "Reason", "allocate", "decode", "decoding_rules", "insert", "make_programs",
    "prefill", "prepare", "programs",
]  # fmt: skip


class Reason(enum.IntEnum):
    """Why a row has ended, if it has."""

    RUNNING = 0
    EOS = 1
    """It has generated an eos of its own."""
    LIMIT = 2
    """It has as many new tokens as it may, or its slots of the cache are full."""
    NO_PROMPT = 3
    """It was padding of the batch."""
    CANCELLED = 4
    """Its caller wants no more of it, and has set this by `reason_B.at[row].set(...)`."""


class Decoding(NamedTuple):
    """The state of B rows between two steps.

    Small arrays are whole on every device and process, so that each can read them. `decode` and `insert` consume the
    one they are given.
    """

    cache: KVCache
    """Of S slots; the keys and values of the newest token are not in it yet."""
    seen_BV: Array
    """bool, cut by batch: tokens of the prompt or the output."""
    output_BS: Array
    """int32: the new tokens of a row in its first step_B columns, its eos included."""
    log_probs_BS: Array | None
    """fp32, beside output_BS: log_softmax of the logits as the model gave them, divided by `log_prob_temperature`:
    before penalty, temperature and cuts. None where they were not asked for."""
    token_B: Array
    """int32: the newest token."""
    position_B: Array
    """int32: its position."""
    step_B: Array
    """int32: new tokens of each row."""
    reason_B: Array
    """int8, of `Reason`."""
    sampling: Sampling


class Programs(NamedTuple):
    """The jitted functions behind `prefill`, `insert` and `decode`; to run with `decoding_rules()` and the mesh in use.

    prefill(prepared, ids_BT, segments_BT, sampling, length=, top_k=, log_probs=),
    allocate(prepared, sampling, length=, log_probs=), insert(decoding, prefilled, rows_from, rows_to),
    decode(prepared, decoding, steps, top_k=). All arguments but `prepared` are arrays; rows_to of insert is as long as
    `decoding` has rows, and ends in -1 where there is nothing to insert.
    """

    prefill: Any
    allocate: Any
    insert: Any
    decode: Any


def prefill(
    prepared: Prepared,
    ids_BT: Array | np.ndarray,
    segments_BT: Array | np.ndarray,
    sampling: Sampling,
    *,
    length: int,
    top_k: int,
    log_probs: bool = False,
) -> Decoding:
    """Runs prompts into an empty cache of `length` slots and chooses each one's first token.

    `ids_BT` and `segments_BT` are int32; segment 1 is a token and 0 padding, left or right; a row of padding alone is
    no prompt. B must be a multiple of the parts into which the mesh cuts the batch. Left padding takes slots of the
    cache, right padding does not. Compiled once for each B, T, `length`, `top_k`, `log_probs` and which settings are
    None.
    """
    with _runs_on(prepared.params["norm"]["weight"]):
        run = programs(prepared.compute).prefill
        arrays = from_host((ids_BT, segments_BT, sampling))
        return run(prepared, *arrays, length=length, top_k=top_k, log_probs=log_probs)


def allocate(prepared: Prepared, sampling: Sampling, *, length: int, log_probs: bool = False) -> Decoding:
    """Rows of no prompt with an empty cache of `length` slots, one for each of `sampling`, into which to `insert`.

    `sampling` must have the settings that are None in that of the rows to insert, and no others.
    """
    with _runs_on(prepared.params["norm"]["weight"]):
        return make_programs().allocate(prepared, from_host(sampling), length=length, log_probs=log_probs)


def insert(decoding: Decoding, prefilled: Decoding, rows_from: Sequence[int], rows_to: Sequence[int]) -> Decoding:
    """`decoding`, which is used up, with rows `rows_from` of `prefilled` in the place of its rows `rows_to`.

    A row goes on as it would have gone on where it was. The cache of `prefilled` may have fewer slots. Compiled once
    for the shapes of both, however many rows are inserted. Raises ValueError if `prefilled` has more slots, if only one
    of both has log-probabilities or a setting that is not None, and for rows that do not exist.
    """
    _check_insert(decoding, prefilled, rows_from, rows_to)
    with _runs_on(decoding.cache.k):
        padding = [-1] * (len(decoding.step_B) - len(rows_to))
        rows = (np.array([*rows, *padding], np.int32) for rows in (rows_from, rows_to))
        return make_programs().insert(decoding, prefilled, *from_host(tuple(rows)))


def decode(prepared: Prepared, decoding: Decoding, *, top_k: int, steps: int) -> Decoding:
    """At most `steps` tokens more of each row that runs; ends early when none does. `decoding` is used up.

    Compiled once for each shape of `decoding` and each `top_k`.
    """
    with _runs_on(prepared.params["norm"]["weight"]):
        return programs(prepared.compute).decode(prepared, decoding, from_host(np.int32(steps)), top_k=top_k)


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


def _check_insert(decoding: Decoding, prefilled: Decoding, rows_from: Sequence[int], rows_to: Sequence[int]) -> None:
    if jax.tree.structure(decoding) != jax.tree.structure(prefilled):  # type: ignore[operator]  # jax's stub
        raise ValueError(
            "prefilled has not the arrays of decoding: both must have log_probs_BS, temperature, top_p and vocab_size, "
            "or neither."
        )
    slots, most = prefilled.cache.k.shape[3], decoding.cache.k.shape[3]
    if slots > most:
        raise ValueError(f"prefilled has {slots} slots; it must have at most those of decoding, {most}.")
    if len(rows_from) != len(rows_to) or len(rows_to) == 0 or len(set(rows_to)) != len(rows_to):
        raise ValueError(f"rows_to = {rows_to!r} is not valid: it must be as many different rows as rows_from.")
    for name, rows, state in (("rows_from", rows_from, prefilled), ("rows_to", rows_to, decoding)):
        count = len(state.step_B)
        if not all(0 <= row < count for row in rows):
            raise ValueError(f"{name} = {rows!r} is not valid: rows must be in 0..{count - 1}.")


# ------------------------------------------------------------------------------------------------------- the programs


def _run_prefill(
    prepared: Prepared, ids_BT: Array, segments_BT: Array, sampling: Sampling, *, length: int, top_k: int,
    log_probs: bool,
) -> Decoding:  # fmt: skip
    model, V = prepared.merge(), prepared.config.vocab_size
    count_B = (segments_BT != 0).sum(axis=1)
    empty = _run_allocate(prepared, sampling, length=length, log_probs=log_probs)
    h_BTD, appended = model.hidden_states(ids_BT, None, segments_BT, empty.cache)
    assert appended is not None  # as the cache was

    def last_token(h_BTD: Array, length_B: Array) -> Array:
        return jnp.take_along_axis(h_BTD, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)

    def mark_seen(ids_BT: Array, segments_BT: Array) -> Array:
        # Padding counts as a token that is not there, so that the penalty does not see it.
        ids_BT = jnp.where(segments_BT == 0, V, ids_BT)
        mark = jax.vmap(lambda ids: jnp.zeros(V, bool).at[ids].set(True, mode="drop"))
        return mark(ids_BT)

    start = empty._replace(
        cache=appended,
        seen_BV=_by_rows(mark_seen, ids_BT, segments_BT),
        position_B=count_B - 1,
        reason_B=jnp.where(count_B == 0, Reason.NO_PROMPT, Reason.RUNNING).astype(jnp.int8),
    )
    return _choose_next(start, model.lm_head(_by_rows(last_token, h_BTD, appended.length)), top_k)


def _run_allocate(prepared: Prepared, sampling: Sampling, *, length: int, log_probs: bool) -> Decoding:
    B, V = len(sampling.place), prepared.config.vocab_size
    return Decoding(
        cache=init_cache(prepared.config, prepared.compute, B, length),
        seen_BV=reshard(jnp.zeros((B, V), bool), "batch", None),
        output_BS=jnp.zeros((B, length), jnp.int32),
        log_probs_BS=jnp.zeros((B, length), jnp.float32) if log_probs else None,
        token_B=jnp.zeros(B, jnp.int32),
        position_B=jnp.full(B, -1, jnp.int32),
        step_B=jnp.zeros(B, jnp.int32),
        reason_B=jnp.full(B, Reason.NO_PROMPT, jnp.int8),
        # Arrays of the host have no layout until they are given one.
        sampling=jax.tree.map(lambda x: reshard(x, None), sampling),
    )


def _run_decode(prepared: Prepared, decoding: Decoding, steps: Array, *, top_k: int) -> Decoding:
    model = prepared.merge()

    def goes_on(carry: tuple[Array, Decoding]) -> Array:
        done, decoding = carry
        return (done < steps) & jnp.any(decoding.reason_B == Reason.RUNNING)

    def step(carry: tuple[Array, Decoding]) -> tuple[Array, Decoding]:
        done, decoding = carry
        return done + 1, _decode_step(model, decoding, top_k)

    return jax.lax.while_loop(goes_on, step, (jnp.zeros((), jnp.int32), decoding))[1]


def _decode_step(model: Baichuan2, decoding: Decoding, top_k: int) -> Decoding:
    """One token more of each row that runs; the others compute along, and stay as they are."""
    cache = decoding.cache
    is_full_B = cache.length >= cache.k.shape[3]
    reason_B = jnp.where(is_full_B & (decoding.reason_B == Reason.RUNNING), Reason.LIMIT, decoding.reason_B)
    reason_B = reason_B.astype(jnp.int8)
    ids_BT, positions_BT = (reshard(x[:, None], "batch", "sequence") for x in (decoding.token_B, decoding.position_B))
    h_BTD, appended = model.hidden_states(ids_BT, positions_BT, None, cache)
    assert appended is not None  # as the cache was
    length = jnp.where(reason_B == Reason.RUNNING, appended.length, cache.length)
    decoding = decoding._replace(cache=appended._replace(length=length), reason_B=reason_B)
    return _choose_next(decoding, model.lm_head(h_BTD), top_k)


def _choose_next(decoding: Decoding, logits_BTV: Array, top_k: int) -> Decoding:
    """Draws the next token of each row that runs from logits [B, 1, V] and appends it."""
    runs_B, step_B, limit_B = decoding.reason_B == Reason.RUNNING, decoding.step_B, decoding.sampling.limit

    def choose(logits_BV: Array, seen_BV: Array, runs_B: Array, step_B: Array, sampling: Sampling):
        keys_B = row_keys(sampling.seed, step_B, sampling.place)
        allowed_BV = mask_absent(logits_BV, sampling.vocab_size, sampling.eos_token_id)
        penalized_BV = penalize_repetition(allowed_BV, seen_BV, sampling.repetition_penalty)
        temperature, top_p = sampling.temperature, sampling.top_p
        token_B = sample_tokens(penalized_BV, keys_B, temperature=temperature, top_k=top_k, top_p=top_p)
        log_prob_B = None
        if decoding.log_probs_BS is not None:
            divisor = 1.0 if sampling.log_prob_temperature is None else sampling.log_prob_temperature[:, None]
            log_probs_BV = jax.nn.log_softmax(logits_BV / divisor)
            log_prob_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=1)[:, 0]
        drawn_B = jnp.where(runs_B, token_B, logits_BV.shape[1])
        seen_BV = seen_BV.at[jnp.arange(len(drawn_B)), drawn_B].set(True, mode="drop")
        return seen_BV, (token_B, log_prob_B)

    with jax.named_scope("sample"):
        # Each device takes the whole vocabulary of its own rows: 0.5 MB a row, once per token.
        rows = (decoding.seen_BV, runs_B, step_B, decoding.sampling)
        seen_BV, drawn = _by_rows(choose, reshard(logits_BTV[:, 0], "batch", None), *rows)
        token_B, log_prob_B = jax.tree.map(lambda x: reshard(x, None), drawn)
    is_next_BS = runs_B[:, None] & (jnp.arange(decoding.output_BS.shape[1]) == step_B[:, None])
    reason_B = jnp.where(step_B + 1 >= limit_B, Reason.LIMIT, Reason.RUNNING)
    is_eos_B = (token_B[:, None] == decoding.sampling.eos_token_id).any(axis=1)
    reason_B = jnp.where(is_eos_B, Reason.EOS, reason_B).astype(jnp.int8)
    log_probs_BS = decoding.log_probs_BS
    return decoding._replace(
        seen_BV=seen_BV,
        output_BS=jnp.where(is_next_BS, token_B[:, None], decoding.output_BS),
        log_probs_BS=None if log_probs_BS is None else jnp.where(is_next_BS, log_prob_B[:, None], log_probs_BS),
        token_B=jnp.where(runs_B, token_B, decoding.token_B),
        position_B=decoding.position_B + runs_B,
        step_B=step_B + runs_B,
        reason_B=jnp.where(runs_B, reason_B, decoding.reason_B),
    )


def _by_rows(function: Callable, *trees: Any) -> Any:
    """function(*trees) on each device's own rows, which come first in every array of `trees` and of the result."""

    def axes(x: Array) -> tuple[str | None, ...]:
        return "batch", *[None] * (x.ndim - 1)

    trees = jax.tree.map(lambda x: reshard(x, *axes(x)), trees)
    if named_sharding() is None:
        return function(*trees)
    return jax.shard_map(function, in_specs=jax.tree.map(lambda x: spec(*axes(x)), trees), out_specs=spec("batch"))(
        *trees
    )


def _run_insert(decoding: Decoding, prefilled: Decoding, rows_from: Array, rows_to: Array) -> Decoding:
    rows = ("batch", None)
    cut = KVCache(CACHE_AXES, CACHE_AXES, Tokens(rows, rows), (None,))  # type: ignore[arg-type]  # axes for arrays
    axes = jax.tree.map(lambda x: (None,) * x.ndim, decoding)._replace(cache=cut, seen_BV=rows)
    # Slots that the prefill has not are empty: of keys and values, whatever was there before may stay.
    missing = decoding.output_BS.shape[1] - prefilled.output_BS.shape[1]
    tokens = Tokens(*(jnp.pad(x, ((0, 0), (0, missing))) for x in prefilled.cache.tokens))
    prefilled = prefilled._replace(cache=prefilled.cache._replace(tokens=tokens))

    def put(target: Array, source: Array, axes: tuple[str | None, ...]) -> Array:
        dim = axes.index("batch") if "batch" in axes else 0
        own = reshard(jnp.arange(target.shape[dim]), axes[dim])
        source = reshard(source, *(None if axis == "batch" else axis for axis in axes))
        arguments = (target, source, own, rows_from, rows_to)
        if named_sharding() is None:
            return _put_rows(*arguments, dim=dim)
        target_spec, whole = spec(*axes), spec(*(None if axis == "batch" else axis for axis in axes))
        in_specs = (target_spec, whole, spec(axes[dim]), spec(), spec())
        return jax.shard_map(functools.partial(_put_rows, dim=dim), in_specs=in_specs, out_specs=target_spec)(
            *arguments
        )

    return jax.tree.map(put, decoding, prefilled, axes)


def _put_rows(target: Array, source: Array, own: Array, rows_from: Array, rows_to: Array, *, dim: int) -> Array:
    """Rows of `source` over those of one device's part of `target`, the rows `own`; rows are dimension `dim`."""

    def put(i: Array, target: Array) -> Array:
        row = rows_to[i] - own[0]
        start: list[Any] = [0] * target.ndim
        start[dim] = jnp.clip(row, 0, len(own) - 1)
        new = jax.lax.dynamic_slice_in_dim(source, rows_from[i], 1, dim)
        old = jax.lax.dynamic_slice(target, start, new.shape)
        return jax.lax.dynamic_update_slice(target, jnp.where(row == start[dim], new, old), start)

    return jax.lax.fori_loop(0, (rows_to >= 0).sum(), put, target)


def programs(compute: ComputeConfig) -> Programs:
    """The programs, on a TPU with the compiler options that `compute` chooses."""
    chip = current_chip()
    if chip is None or compute.compiler_options == "default":
        return make_programs()
    return make_programs(**compiler_options(chip, inference=True))


@functools.cache
def make_programs(**options: Value) -> Programs:
    """The programs, jitted once for these compiler options; to allocate and to insert is to copy, and needs none."""
    return Programs(
        prefill=jax.jit(_run_prefill, static_argnames=("length", "top_k", "log_probs"), compiler_options=options),
        allocate=jax.jit(_run_allocate, static_argnames=("length", "log_probs")),
        insert=jax.jit(_run_insert, donate_argnums=0),
        decode=jax.jit(_run_decode, static_argnames="top_k", donate_argnums=1, compiler_options=options),
    )
