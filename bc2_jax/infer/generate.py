"""Continuing prompts: one prefill, then one token of every sequence per step, all on the device.

Prompts are padded on the left to one length, so that all sequences write the same cache slot in a step. Shapes are
rounded up (`bucket`), so that calls of about the same size share their compiled functions: the prefill is compiled
once per (batch, prompt bucket, cache bucket), the decode loop once per (batch, cache bucket).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer.cache import init_cache
from bc2_jax.infer.sampling import penalize_repetition, sample_tokens
from bc2_jax.kernels.blocks import current_chip
from bc2_jax.model.attention import KVCache
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.sharding import named_sharding, parts, reshard, rules_in_use, spec, to_host, use_mesh_of, use_rules
from bc2_jax.tpu.options import compiler_options

OnToken = Callable[[int, list[int | None]], None]
"""Called with the step, from 0, and the new token of each prompt: None for those that have stopped."""


class Sampling(NamedTuple):
    """The choices that do not shape the compiled functions; those that do are top_k and which of these are None."""

    temperature: Array | float | None
    """None is greedy."""
    top_p: Array | float | None
    """None keeps all."""
    repetition_penalty: Array | float
    eos_token_id: Array | int
    key: Array


class Decoding(NamedTuple):
    """The state between two steps. Small things are whole on every device and process, so each can read them."""

    cache: KVCache
    seen_BV: Array
    """bool, cut by batch: tokens of the prompt or the output."""
    output_BS: Array
    """int32: the tokens generated so far in the first `step` columns, eos from a sequence's end on."""
    token_B: Array
    """int32: the newest token, whose keys and values are not in the cache yet."""
    position_B: Array
    """int32: its position."""
    stopped_B: Array
    """bool: has generated eos, or is no prompt."""
    step: Array
    """int32 scalar: tokens generated so far for each sequence."""


def generate(
    model: Baichuan2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 2048,
    temperature: float = 0.3,
    top_k: int = 5,
    top_p: float = 0.85,
    repetition_penalty: float = 1.05,
    seed: int = 0,
    eos_token_id: int | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """The continuation of each prompt: new tokens only, without the eos that ended it.

    `prompts` are token ids; nothing is added to them. A sequence ends at `eos_token_id` (by default the config's) or
    after `max_new_tokens`. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off; a repetition_penalty of 1 does
    nothing. The defaults are those of the released chat models.

    A prompt's continuation depends on its place in the list and the seed, not on the other prompts or the mesh, up to
    the rounding of matmuls of another shape. Works on a model whose parameters are sharded; any number of prompts.

    `on_token` is called after every step until all have stopped; without it the host waits only for the end.

    Raises ValueError for no prompts, an empty one, ids out of range, a prompt that leaves no room for max_new_tokens in
    model_max_length, and settings out of range.
    """
    config = model.config
    eos_token_id = config.eos_token_id if eos_token_id is None else eos_token_id
    _check_settings(config, max_new_tokens, temperature, top_k, top_p, repetition_penalty, eos_token_id)
    _check_prompts(config, prompts, max_new_tokens)
    if temperature == 0:
        top_k, top_p = 0, 1.0  # so that all greedy calls share one compiled function
    graphdef, state = nnx.split(model)
    # Before the mesh is known: outside jit there is no computing on a mesh taken from an array.
    sampling = Sampling(
        temperature=None if temperature == 0 else float(temperature),
        top_p=None if top_p == 1 else float(top_p),
        repetition_penalty=float(repetition_penalty),
        eos_token_id=int(eos_token_id),
        key=jax.random.key(seed),
    )
    # One new token cannot be cut: the devices that share a sequence each work on the whole of it, and share only the
    # heads of attention.
    rules = dataclasses.replace(rules_in_use(), sequence=None)
    with use_mesh_of(model.norm.weight[...]), use_rules(rules):
        ids_BT, segments_BT = _pad_prompts(prompts, parts("batch"), config.pad_token_id)
        length = bucket(ids_BT.shape[1] + max_new_tokens)
        params = _prepare_params(graphdef, nnx.to_pure_dict(state))
        prefill, loop = _programs(model.compute)
        decoding = prefill(graphdef, params, ids_BT, segments_BT, sampling, length=length, top_k=top_k)
        decode = functools.partial(loop, graphdef, params, sampling=sampling, top_k=top_k)
        if on_token is None:
            decoding = decode(decoding, limit=np.int32(max_new_tokens))
        else:
            for step in range(max_new_tokens):
                if step:
                    decoding = decode(decoding, limit=np.int32(step + 1))
                tokens = [None if t == eos_token_id else int(t) for t in to_host(decoding.token_B)[: len(prompts)]]
                if all(token is None for token in tokens):
                    break
                on_token(step, tokens)
        output_BS, steps = to_host(decoding.output_BS), int(decoding.step)
    return [_until(row[:steps].tolist(), eos_token_id) for row in output_BS[: len(prompts)]]


def bucket(length: int) -> int:
    """`length` rounded up: 64, 128, 256, then multiples of 256."""
    return max(64, 2 ** math.ceil(math.log2(length))) if length <= 256 else -(-length // 256) * 256


# ------------------------------------------------------------------------------------------------------- on the host


def _check_settings(
    config: ModelConfig,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    eos_token_id: int,
) -> None:
    for name, value, ok, legal in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "finite and at least 0, which is greedy"),
        ("top_k", top_k, top_k >= 0, "at least 0, which keeps all"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]; 1 keeps all"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "positive and finite"),
        ("eos_token_id", eos_token_id, 0 <= eos_token_id < config.vocab_size, f"in 0..{config.vocab_size - 1}"),
    ):
        if not ok:
            raise ValueError(f"{name} = {value!r} is not valid: it must be {legal}.")


def _check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if len(prompts) == 0:
        raise ValueError("prompts is empty: at least one prompt is needed.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] is empty: at least one token is needed.")
        if bad := [t for t in prompt if not 0 <= t < config.vocab_size]:
            raise ValueError(f"prompts[{i}] has token id {bad[0]}: it must be in 0..{config.vocab_size - 1}.")
        if len(prompt) + max_new_tokens > config.model_max_length:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, which with max_new_tokens = {max_new_tokens} is more than "
                f"model_max_length = {config.model_max_length}."
            )


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


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


# ----------------------------------------------------------------------------------------------------- on the device


_TRANSPOSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


@functools.partial(jax.jit, static_argnums=0)
def _prepare_params(graphdef: Any, params: Params) -> Params:
    """What would otherwise be done again for every token: weights in the compute dtype, the head's rows normalised.

    The embedding and the head are gathered along the model dimension as well: every step reads all of the head.
    Weights that multiply the hidden states change places with the model dimension, q, k and v to [L, N, D, H], gate and
    up to [L, F, D]: in their stored order the TPU compiler copies them before the first step of each call, gate and up
    where a chip's part of F does not fill its tiles, q, k and v for a single sequence. Norm weights stay as they are,
    for they scale in fp32. Results equal those of the stored parameters.
    """
    model: Baichuan2 = nnx.merge(graphdef, params)
    dtype = jnp.dtype(model.compute.dtype)

    def cast(path, w):
        return w if "norm" in jax.tree_util.keystr(path) else w.astype(dtype)

    prepared = jax.tree_util.tree_map_with_path(cast, params)
    tables = {"embed_tokens": model.embed_tokens.weight[...], "lm_head": model.lm_head.rows()}
    for name, table_VD in tables.items():
        prepared[name] = {"weight": reshard(table_VD.astype(dtype), "vocab", None)}
    for part, names in _TRANSPOSED.items():
        for name in names:
            weights = prepared["layers"][part][name]
            weights["weight"] = jnp.swapaxes(weights["weight"], 1, 2)
    return prepared


def _merge_prepared(graphdef: Any, prepared: Params) -> Baichuan2:
    model = nnx.merge(graphdef, prepared)
    model.lm_head.normalize = False  # its rows are
    for part, names in _TRANSPOSED.items():
        for name in names:
            linear = getattr(getattr(model.layers, part), name)
            weight = linear.weight[...]
            linear.weight = nnx.Param(jnp.swapaxes(weight, 1, 2))
            linear.move_model_axis_behind()
    return model


def _forward(
    model: Baichuan2, ids_BT: Array, positions_BT: Array | None, segments_BT: Array | None, cache: KVCache
) -> tuple[Array, KVCache]:
    """Logits [B, 1, V] after the last column, which left padding makes the last token of every sequence."""
    h_BTD, appended = model.hidden_states(ids_BT, positions_BT, segments_BT, cache)
    assert appended is not None  # as the cache was
    return model.lm_head(h_BTD[:, -1:]), appended


def _run_prefill(
    graphdef: Any, params: Params, ids_BT: Array, segments_BT: Array, sampling: Sampling, *, length: int, top_k: int
) -> Decoding:
    """Runs the left-padded prompts into an empty cache of `length` slots and chooses each one's first token."""
    model = _merge_prepared(graphdef, params)
    V = model.config.vocab_size
    (B, _), position_B = ids_BT.shape, segments_BT.sum(axis=1)
    stopped_B = position_B == 0
    ids_BT, segments_BT = (reshard(x, "batch", None) for x in (ids_BT, segments_BT))
    cache = init_cache(model.config, model.compute, B, length)
    logits_BTV, cache = _forward(model, ids_BT, None, segments_BT, cache)

    def mark_seen(ids_BT: Array, segments_BT: Array) -> Array:
        # Padding counts as a token that is not there, so that the penalty does not see it.
        ids_BT = jnp.where(segments_BT == 0, V, ids_BT)
        mark = jax.vmap(lambda ids: jnp.zeros(V, bool).at[ids].set(True, mode="drop"))
        return mark(ids_BT)

    seen_BV = _by_rows(mark_seen, ids_BT, segments_BT)
    start = Decoding(
        cache=cache,
        seen_BV=seen_BV,
        output_BS=jnp.zeros((B, length), jnp.int32),
        token_B=jnp.zeros(B, jnp.int32),
        position_B=position_B - 1,
        stopped_B=stopped_B,
        step=jnp.zeros((), jnp.int32),
    )
    return _choose_next(start, logits_BTV, sampling, top_k)


def _run_decode(
    graphdef: Any, params: Params, decoding: Decoding, *, sampling: Sampling, top_k: int, limit: Array
) -> Decoding:
    """Steps until each sequence has `limit` tokens or all have stopped."""
    model = _merge_prepared(graphdef, params)

    def goes_on(decoding: Decoding) -> Array:
        return (decoding.step < limit) & ~jnp.all(decoding.stopped_B)

    return jax.lax.while_loop(goes_on, lambda decoding: decode_step(model, decoding, sampling, top_k), decoding)


def decode_step(model: Baichuan2, decoding: Decoding, sampling: Sampling, top_k: int) -> Decoding:
    """One token more of every sequence; `model` holds prepared parameters."""
    ids_BT, positions_BT = (reshard(x[:, None], "batch", "sequence") for x in (decoding.token_B, decoding.position_B))
    logits_BTV, cache = _forward(model, ids_BT, positions_BT, None, decoding.cache)
    return _choose_next(decoding._replace(cache=cache), logits_BTV, sampling, top_k)


_PREFILL: dict[str, Any] = {"static_argnums": 0, "static_argnames": ("length", "top_k")}
_DECODE: dict[str, Any] = {"static_argnums": 0, "static_argnames": "top_k", "donate_argnums": 2}
_prefill = jax.jit(_run_prefill, **_PREFILL)
_decode = jax.jit(_run_decode, **_DECODE)


def _programs(compute: ComputeConfig) -> tuple[Callable[..., Decoding], Callable[..., Decoding]]:
    """Prefill and decoding loop, on a TPU with the compiler options that `compute` chooses."""
    chip = current_chip()
    return (_prefill, _decode) if chip is None or compute.compiler_options == "default" else _tuned(chip)


@functools.cache
def _tuned(chip: str) -> tuple[Callable[..., Decoding], Callable[..., Decoding]]:
    options = compiler_options(chip, inference=True)
    return (
        jax.jit(_run_prefill, compiler_options=options, **_PREFILL),
        jax.jit(_run_decode, compiler_options=options, **_DECODE),
    )


def _choose_next(decoding: Decoding, logits_BTV: Array, sampling: Sampling, top_k: int) -> Decoding:
    """Draws the next token of each sequence from logits [B, 1, V] and appends it."""

    def choose(logits_BV: Array, seen_BV: Array, row_B: Array, stopped_B: Array, sampling: Sampling, step: Array):
        # One key for each place in the list and each step: neither the mesh nor the size of the batch has a say.
        key = jax.random.fold_in(sampling.key, step)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)
        logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
        temperature, top_p = sampling.temperature, sampling.top_p
        token_B = sample_tokens(logits_BV, keys_B, temperature=temperature, top_k=top_k, top_p=top_p)
        token_B = jnp.where(stopped_B, sampling.eos_token_id, token_B)
        return token_B, seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)

    with jax.named_scope("sample"):
        # Each device takes the whole vocabulary of its own rows: 0.5 MB a row, once per token.
        logits_BV = reshard(logits_BTV[:, 0], "batch", None)
        rows = (reshard(x, "batch") for x in (jnp.arange(logits_BV.shape[0]), decoding.stopped_B))
        token_B, seen_BV = _by_rows(choose, logits_BV, decoding.seen_BV, *rows, whole=(sampling, decoding.step))
        token_B = reshard(token_B, None)
    start = (jnp.zeros((), jnp.int32), decoding.step)
    return decoding._replace(
        seen_BV=seen_BV,
        output_BS=jax.lax.dynamic_update_slice(decoding.output_BS, token_B[:, None], start),
        token_B=token_B,
        position_B=decoding.position_B + 1,
        stopped_B=decoding.stopped_B | (token_B == sampling.eos_token_id),
        step=decoding.step + 1,
    )


def _by_rows(function: Callable, *arrays: Array, whole: tuple = ()) -> Any:
    """function(*arrays, *whole) on each device's own rows of `arrays`; `whole` is the same everywhere."""
    if named_sharding() is None:
        return function(*arrays, *whole)
    in_specs = tuple(spec("batch", *[None] * (x.ndim - 1)) for x in arrays)
    whole_specs = jax.tree.map(lambda _: spec(), whole)
    # A result's rows come first as well; unnamed dimensions of a spec are not cut.
    return jax.shard_map(function, in_specs=(*in_specs, *whole_specs), out_specs=spec("batch"))(*arrays, *whole)
