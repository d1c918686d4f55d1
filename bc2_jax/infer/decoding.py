"""Arrays that the programs of `infer/engine.py` take and return: batch state, KV cache, prompt chunks, new tokens."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import ComputeConfig, ModelConfig
from bc2_jax.infer.settings import Sampling
from bc2_jax.kernels.cached import BLOCK, LANES, KVCache
from bc2_jax.model.attention import CACHE_AXES
from bc2_jax.sharding import named_sharding, parts, platform, reshard, spec

STEPS = 8
"""Most steps of one `decode`."""
CacheDType = Literal["compute", "int8"]
"""How keys and values are stored: in the compute dtype, or in int8 with one fp32 scale per token and head."""


class Reason(enum.IntEnum):
    """Whether a row is running, and if not, why."""

    RUNNING = 0
    EOS = 1  # it generated one of its eos ids
    LIMIT = 2  # it reached its limit of new tokens, or its cache slots are full
    NO_PROMPT = 3  # it has no prompt yet, or only part of one
    CANCELLED = 4  # its caller needs no more tokens


class Decoding(NamedTuple):
    """State of a batch of B rows, each with its own length, settings and step. Programs donate the state they get.

    Small arrays are replicated on every device and process.
    """

    cache: KVCache  # S slots per row; the newest token's keys and values are not in it yet
    length_B: Array  # int32: slots in use
    seen_BV: Array  # bool: tokens of the prompt or the output; sharded by `sampling_axis`
    counts_BV: Array | None
    """int16: count of each token in the output, sharded as `seen_BV`; None if no row may have a penalty for it."""
    token_B: Array  # int32: the newest token, at position length_B
    step_B: Array  # int32: number of new tokens
    reason_B: Array  # int8: `Reason`
    sampling: Sampling
    stretch_B: Array | None  # fp32: `Prepared.stretch` of each row; None without a long context


class Chunk(NamedTuple):
    """The next C tokens of R prompts, as host arrays.

    R is a multiple of the number of batch shards: place i of shard p holds a row of shard p. If R equals the number of
    rows, place i is row i.
    """

    ids_RC: Any  # int32, padded on the right
    rows_R: Any  # int32: the batch row of each prompt
    start_R: Any  # int32: number of tokens before this chunk
    count_R: Any  # int32: number of tokens, 0..C; 0 skips this place
    is_last_R: Any  # bool: the prompt ends here; its first new token is sampled and the row starts to run
    prompt_RS: Any  # int32: the whole prompt if it ends here, padded with -1, for the repetition penalty
    stretch_R: Any | None = None
    """fp32: `Prepared.stretch` of the prompt and all its new tokens; the same in all chunks of a prompt."""


class LogProbs(NamedTuple):
    """log_softmax in nats of the model's fp32 logits, before penalties, temperature, top_k and top_p.

    X are the dimensions of the tokens, P is MOST_TOP_LOG_PROBS; zeros where a row did not ask for them.
    """

    chosen_X: Array  # of the sampled token; logits are divided by `log_prob_temperature` first if it was given
    top_ids_XP: Array  # int32, the most likely first
    top_XP: Array


class Emitted(NamedTuple):
    """New tokens of a program, replicated on every process. Not donated to the next program."""

    tokens_BK: Array
    """int32: new tokens of each row in order, padded with -1. K = STEPS; for `extend` K = 1, one row per place."""
    log_probs: LogProbs | None  # of these tokens; None if `Sampling.top_log_probs` is None
    step_B: Array  # int32: number of new tokens so far
    reason_B: Array  # int8: `Reason`


def init_cache(config: ModelConfig, compute: ComputeConfig, rows: int, slots: int, kv: CacheDType) -> KVCache:
    """An empty KV cache for `rows` sequences of `slots` tokens, sharded over batch and heads on the current mesh.

    It takes 4 * L * D bytes per token in bf16: 2 GiB for a 7B sequence of 4096 tokens, 3.1 GiB for 13B; int8 takes half
    of that plus 3 % for scales. On a CPU, where bf16 matmuls are slow, the cache is fp32.
    """
    assert slots % BLOCK == 0, slots
    shape = (config.num_hidden_layers, rows, config.num_attention_heads, slots, config.head_dim)
    if kv == "int8":
        k, v = (reshard(jnp.zeros(shape, jnp.int8), *CACHE_AXES) for _ in "kv")
        scales = (*shape[:3], slots // LANES, LANES)
        k_scale, v_scale = (reshard(jnp.zeros(scales, jnp.float32), *CACHE_AXES) for _ in "kv")
        return KVCache(k, v, k_scale, v_scale)
    dtype = "float32" if platform() == "cpu" else compute.dtype
    k, v = (reshard(jnp.zeros(shape, dtype), *CACHE_AXES) for _ in "kv")
    return KVCache(k, v, None, None)


class PlacedPrompt(NamedTuple):
    """A prompt and its row in the batch."""

    row: int
    ids: Sequence[int]


def make_chunk(
    placed: Sequence[PlacedPrompt | None], starts: int | Sequence[int], size: int, slots: int,
    stretches: Sequence[float] | None = None,
) -> Chunk:  # fmt: skip
    """Tokens start..start + size of each prompt, for a cache of `slots` slots.

    `starts` is one start for all prompts or one each. A place that is None, or whose prompt ends before its start, gets
    no tokens. `stretches` (`Prepared.stretch` of each prompt) are required for a model with a long context.
    """
    R = len(placed)
    start_R = np.broadcast_to(np.asarray(starts, np.int32), R).copy()
    chunk = Chunk(
        ids_RC=np.zeros((R, size), np.int32), rows_R=np.zeros(R, np.int32), start_R=start_R,
        count_R=np.zeros(R, np.int32), is_last_R=np.zeros(R, bool), prompt_RS=np.full((R, slots), -1, np.int32),
        stretch_R=None if stretches is None else np.asarray(stretches, np.float32),
    )  # fmt: skip
    for place, prompt in enumerate(placed):
        if prompt is None:
            continue
        chunk.rows_R[place] = prompt.row
        start = int(start_R[place])
        ids = prompt.ids[start : start + size]
        chunk.ids_RC[place, : len(ids)], chunk.count_R[place] = ids, len(ids)
        if len(ids) > 0 and start + size >= len(prompt.ids):
            chunk.is_last_R[place] = True
            chunk.prompt_RS[place, : len(prompt.ids)] = prompt.ids
    return chunk


def sampling_axis(rows: int) -> str:
    """Logical axis that shards the rows during sampling: all devices if the number of rows allows it, else "batch"."""
    return "batch" if rows % parts("sampling") else "sampling"


def by_rows(function: Callable, *trees: Any, axes: str | Sequence[str] = "batch") -> Any:
    """Calls function(*trees) on each device with its own rows, the first axis of all arrays of `trees` and of the
    result.

    `axes` is the logical axis of the rows, for all trees or one each; the result is sharded as the first tree.
    """
    axes = [axes] * len(trees) if isinstance(axes, str) else axes
    trees = tuple(
        jax.tree.map(lambda x, axis=axis: reshard(x, axis, *[None] * (x.ndim - 1)), tree)
        for axis, tree in zip(axes, trees, strict=True)
    )
    if named_sharding() is None:
        return function(*trees)
    return jax.shard_map(function, in_specs=tuple(map(spec, axes)), out_specs=spec(axes[0]))(*trees)


def replicate(tree: Any) -> Any:
    """The arrays of `tree`, replicated on every device."""
    return jax.tree.map(lambda x: reshard(jnp.asarray(x), *[None] * jnp.ndim(x)), tree)
