"""From logits to the next token: what may be chosen, and pure functions on fp32 logits [B, V] of one device's rows.

The order is that of the released code (Hugging Face transformers): repetition penalty, temperature, top-k, top-p; ids
that may not be chosen are masked before.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import ModelConfig
from bc2_jax.validation import require

MOST_EOS = 16
"""How many ids may end a row; the compiled functions have room for that many."""
SEEDS = range(2**32)
"""Whole 32-bit numbers: of a larger seed JAX would drop the upper bits."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one prompt is continued; the defaults are those of the released chat models."""

    max_new_tokens: int = 2048
    temperature: float = 0.3
    """0 is greedy."""
    top_k: int = 5
    """0 keeps all."""
    top_p: float = 0.85
    """1 keeps all."""
    repetition_penalty: float = 1.05
    """1 does nothing."""
    seed: int = 0
    """0 to 2^32 - 1."""
    eos_token_id: int | Sequence[int] | None = None
    """The id, or any of the ids, that ends the continuation. None is the model's; an empty list ends at none."""
    vocab_size: int | None = None
    """Ids from this one on are never chosen, but for eos: a model's vocabulary may be padded or grown beyond the pieces
    of its tokenizer, whose `vocab_size` belongs here. None, or more than the model's, leaves every id of the model."""

    def check(self, config: ModelConfig) -> Settings:
        """These settings as plain numbers, with the model's eos filled in, `eos_token_id` a tuple.

        Raises ValueError for one of another type or out of range.
        """
        V = config.vocab_size
        given: Any = config.eos_token_id if self.eos_token_id is None else self.eos_token_id
        legal_eos = f"an id, or a list of at most {MOST_EOS} ids, in 0..{V - 1}"
        eos = [given] if is_whole(given) else _items("eos_token_id", given, legal_eos)
        _require(
            all(is_whole(i) and 0 <= i < V for i in eos) and len(eos) <= MOST_EOS, "eos_token_id", given, legal_eos
        )

        def whole(name: str, ok: Callable[[int], bool], legal: str) -> int:
            value = getattr(self, name)
            _require(is_whole(value) and ok(value), name, value, f"a whole number, {legal}")
            return operator.index(value)

        def real(name: str, ok: Callable[[float], bool], legal: str) -> float:
            value = getattr(self, name)
            _require(_is_real(value) and ok(_as_float32(value)), name, value, f"a number, {legal}")
            return float(value)

        size = None if self.vocab_size is None else whole("vocab_size", lambda n: n >= 1, "at least 1")
        return Settings(
            max_new_tokens=whole("max_new_tokens", lambda n: n >= 1, "at least 1"),
            temperature=real("temperature", lambda x: 0 <= x < math.inf, "finite and at least 0, which is greedy"),
            top_k=whole("top_k", lambda n: n >= 0, "at least 0, which keeps all"),
            top_p=real("top_p", lambda x: 0 < x <= 1, "in (0, 1]; 1 keeps all"),
            repetition_penalty=real("repetition_penalty", lambda x: 0 < x < math.inf, "positive and finite"),
            seed=whole("seed", lambda n: n in SEEDS, "0 to 2^32 - 1"),
            eos_token_id=tuple(map(operator.index, eos)),
            vocab_size=None if size is None or size >= V else size,
        )


def is_whole(value: object) -> bool:
    """Whether `value` is an integer of Python, numpy or JAX; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) or _is_scalar(value, np.integer)


def _is_real(value: object) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating) or _is_scalar(value, np.floating)


def _as_float32(value: Any) -> float:
    """`value` as the device gets it: what is too large is infinite."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    except OverflowError:  # a whole number beyond float64
        return math.inf


def _is_scalar(value: object, kind: type) -> bool:
    return isinstance(value, np.ndarray | Array) and value.ndim == 0 and np.issubdtype(value.dtype, kind)


def _items(name: str, value: Any, legal: str) -> list:
    _require(isinstance(value, Iterable) and not isinstance(value, str | bytes | dict), name, value, legal)
    return list(value)


def _require(ok: bool, name: str, value: object, legal: str) -> None:
    require(ok, name, value, f"it must be {legal}")


_ALL = np.iinfo(np.int32).max
DEFAULT_SETTINGS = Settings()
Rows = Any
"""An array of one value for each row: of JAX, or of numpy on its way to the device."""


class Sampling(NamedTuple):
    """The settings of each row, which do not shape the compiled functions; those that do are top_k, one for all rows,
    and which of these are None.
    """

    temperature: Rows | None
    """fp32 [B], 0 is greedy; None is greedy for all rows."""
    top_p: Rows | None
    """fp32 [B]; None keeps all tokens of all rows."""
    repetition_penalty: Rows
    """fp32 [B]."""
    eos_token_id: Rows
    """int32 [B, MOST_EOS]: each of them ends the row; the rest is -1."""
    vocab_size: Rows | None
    """int32 [B]: ids from here on are chosen only as an eos; None leaves every id to all rows."""
    seed: Rows
    """uint32 [B]."""
    place: Rows
    """int32 [B]: of the prompt in its caller's list. Seed, step and place together choose the key of a draw."""
    limit: Rows
    """int32 [B]: the most new tokens."""
    log_prob_temperature: Rows | None = None
    """fp32 [B]: what logits are divided by for the log-probabilities that are kept; None is 1 for all rows."""


def sampling_of(settings: Sequence[Settings], places: Sequence[int], log_prob_temperature: float = 1.0) -> Sampling:
    """The arrays, on the host, for rows with these checked settings and places.

    Without a top_k, a row whose top_p is 1 draws other tokens beside rows that have a smaller one than it does alone:
    for these, candidates are sorted.
    """

    def column(name: str, dtype) -> np.ndarray:
        return np.array([getattr(row, name) for row in settings], dtype)

    def eos_of(row: Settings) -> list[int]:
        assert isinstance(row.eos_token_id, tuple)  # as `check` leaves it
        return [*row.eos_token_id, *[-1] * (MOST_EOS - len(row.eos_token_id))]

    temperature, top_p = column("temperature", np.float32), column("top_p", np.float32)
    sizes = [row.vocab_size for row in settings]
    if any(sizes):
        sizes = [_ALL if size is None else size for size in sizes]
    return Sampling(
        temperature=temperature if temperature.any() else None,
        top_p=top_p if temperature.any() and (top_p < 1).any() else None,
        repetition_penalty=column("repetition_penalty", np.float32),
        eos_token_id=np.array([eos_of(row) for row in settings], np.int32),
        vocab_size=None
        if sizes == [None] * len(sizes)
        else np.array([_ALL if s is None else s for s in sizes], np.int32),
        seed=column("seed", np.uint32),
        place=np.array(places, np.int32),
        limit=column("max_new_tokens", np.int32),
        log_prob_temperature=None
        if log_prob_temperature == 1
        else np.full(len(settings), log_prob_temperature, np.float32),
    )


def mask_absent(logits_BV: Array, vocab_size_B: Array | None, eos_BE: Array) -> Array:
    """Logits with -inf for ids from `vocab_size_B` on that are none of a row's eos; -1 in `eos_BE` is not an id."""
    if vocab_size_B is None:
        return logits_BV
    B, V = logits_BV.shape
    is_there_BV = jnp.arange(V) < vocab_size_B[:, None]
    is_there_BV = is_there_BV.at[jnp.arange(B)[:, None], jnp.where(eos_BE < 0, V, eos_BE)].set(True, mode="drop")
    return jnp.where(is_there_BV, logits_BV, -jnp.inf)


def row_keys(seed_B: Array, step_B: Array, place_B: Array) -> Array:
    """One key for each row: neither the mesh, nor the size of the batch, nor the other rows have a say."""
    fold_in = jax.vmap(jax.random.fold_in)
    return fold_in(fold_in(jax.vmap(jax.random.key)(seed_B), step_B), place_B)


def penalize_repetition(logits_BV: Array, seen_BV: Array, penalty: Array | float) -> Array:
    """Makes the tokens marked in `seen_BV` (bool) less likely: positive logits / penalty, negative ones * penalty.

    `penalty` is one for all or [B]; 1 changes nothing. How often a token was seen does not matter (CTRL, arXiv
    1909.05858, section 4.1).
    """
    penalty = jnp.reshape(penalty, (-1, 1))
    penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized, logits_BV)


def sampling_candidates(
    logits_BV: Array, temperature: Array | float, top_k: int, top_p: Array | float | None
) -> tuple[Array, Array]:
    """What is sampled from: ids int32 [B, K] and their log-weights fp32 [B, K], -inf for those that are cut off.

    temperature and top_p are one for all or [B]. The top_k most likely tokens are kept (all for 0), and of these the
    fewest whose share of their probability reaches top_p (all for None or 1); the most likely always stays. Between
    equal logits the smaller id comes first, so never more than top_k are kept. Sorts the vocabulary only for top_k = 0
    with a top_p.
    """
    V = logits_BV.shape[-1]
    k = min(top_k, V) if top_k else V
    if k == V and top_p is None:
        values_BK, ids_BK = logits_BV, jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), logits_BV.shape)
    else:
        values_BK, ids_BK = jax.lax.top_k(logits_BV, k)
    # The peak is taken off before the division: a tiny temperature then gives -inf beside one 0, not inf - inf. Below
    # the smallest normal number the device would flush it to zero.
    temperature = jnp.reshape(jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny), (-1, 1))
    weights_BK = (values_BK - values_BK.max(-1, keepdims=True)) / temperature
    if top_p is not None:
        p_BK = jax.nn.softmax(weights_BK, axis=-1)
        before_BK = jnp.cumsum(p_BK, axis=-1) - p_BK
        top_p = jnp.reshape(top_p, (-1, 1))
        # By name, for rounding of the sum says otherwise: the first at a tiny top_p, the last at 1.
        keep = (before_BK < top_p) | (jnp.arange(k) == 0) | (top_p >= 1)
        weights_BK = jnp.where(keep, weights_BK, -jnp.inf)
    return ids_BK, weights_BK


def sample_tokens(
    logits_BV: Array,
    keys_B: Array,
    *,
    temperature: Array | float | None,
    top_k: int = 0,
    top_p: Array | float | None = None,
) -> Array:
    """The next tokens, int32 [B]; row b draws with `keys_B[b]`, so that it does not depend on the other rows.

    temperature None is greedy, as 0 is: the largest logit, the smallest id among equals. temperature and top_p may be
    arrays, of one value or [B], so that one compiled function serves all their values; top_k and which of them are None
    shape the function.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if temperature is None:
        return greedy_B
    ids_BK, weights_BK = sampling_candidates(logits_BV, temperature, top_k, top_p)
    chosen_B = jax.vmap(jax.random.categorical)(keys_B, weights_BK)
    token_B = jnp.take_along_axis(ids_BK, chosen_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jnp.where(jnp.asarray(temperature) == 0, greedy_B, token_B)
