"""From logits to the next token: what may be chosen, and pure functions on fp32 logits [B, V] of one device's rows.

The order is that of the released code (Hugging Face transformers): repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.config import ModelConfig


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
    eos_token_id: int | None = None
    """None is the model's."""

    def check(self, config: ModelConfig) -> Settings:
        """These settings with the model's eos filled in; raises ValueError for one out of range."""
        eos_token_id = config.eos_token_id if self.eos_token_id is None else self.eos_token_id
        checked = dataclasses.replace(self, eos_token_id=eos_token_id)
        for name, ok, legal in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0, which is greedy"),
            ("top_k", self.top_k >= 0, "at least 0, which keeps all"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 keeps all"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "positive and finite"),
            ("eos_token_id", 0 <= eos_token_id < config.vocab_size, f"in 0..{config.vocab_size - 1}"),
        ):
            if not ok:
                raise ValueError(f"{name} = {getattr(checked, name)!r} is not valid: it must be {legal}.")
        return checked


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
    """int32 [B]."""
    seed: Rows
    """uint32 [B]."""
    place: Rows
    """int32 [B]: of the prompt in its caller's list. Seed, step and place together choose the key of a draw."""
    limit: Rows
    """int32 [B]: the most new tokens."""


def sampling_of(settings: Sequence[Settings], places: Sequence[int]) -> Sampling:
    """The arrays, on the host, for rows with these checked settings and places.

    Without a top_k, a row whose top_p is 1 draws other tokens beside rows that have a smaller one than it does alone:
    for these, candidates are sorted.
    """

    def column(name: str, dtype) -> np.ndarray:
        return np.array([getattr(row, name) for row in settings], dtype)

    temperature, top_p = column("temperature", np.float32), column("top_p", np.float32)
    return Sampling(
        temperature=temperature if temperature.any() else None,
        top_p=top_p if temperature.any() and (top_p < 1).any() else None,
        repetition_penalty=column("repetition_penalty", np.float32),
        eos_token_id=column("eos_token_id", np.int32),
        # As jax.random.key takes a seed without 64-bit integers.
        seed=np.array([row.seed & 0xFFFFFFFF for row in settings], np.uint32),
        place=np.array(places, np.int32),
        limit=column("max_new_tokens", np.int32),
    )


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
