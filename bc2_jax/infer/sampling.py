"""Sampling of the next token: pure functions on fp32 logits [B, V] of one device's rows.

The order is that of transformers' released code, with OpenAI's fields before it: mask of ids that may not be sampled,
logit bias, repetition penalty, presence and frequency penalty, temperature, top-k, top-p. Each setting is an array over
rows, so one compiled function serves all; what no row needs is skipped (`lax.cond`). A row's token does not depend on
other rows or their settings, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.infer.settings import MOST_TOP_LOG_PROBS, Sampling

RARE = "rare_settings"
"""`jax.named_scope` of rarely used settings: bias, min_tokens, top_k 0 or above 64, top log-probs."""
_FEW = 64
"""Largest top_k for which candidates come from `lax.top_k`, whose k is static."""


def next_token(logits_BV: Array, seen_BV: Array, counts_BV: Array | None, step_B: Array, sampling: Sampling) -> Array:
    """Samples the next token of each row, int32 [B], from the model's fp32 logits.

    `seen_BV` (bool) marks tokens of prompt and output. `counts_BV` (integers) counts tokens in the output and is
    required only for presence and frequency penalties. `step_B` (int32) is the number of new tokens so far. If every id
    is masked, the token is 0.
    """
    logits_BV = mask_absent(logits_BV, sampling.vocab_size, sampling.eos_token_id)
    logits_BV = mask_early_eos(logits_BV, sampling.min_tokens, sampling.eos_token_id, step_B)
    logits_BV = add_bias(logits_BV, sampling.bias_ids, sampling.bias)
    logits_BV = penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    logits_BV = penalize_counts(logits_BV, counts_BV, sampling.presence_penalty, sampling.frequency_penalty)
    keys_B = row_keys(sampling.seed, step_B, sampling.place)
    return sample_tokens(
        logits_BV, keys_B, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
    )


# ----------------------------------------------------------------------------------------- changes of single logits


def mask_absent(logits_BV: Array, vocab_size_B: Array | None, eos_BE: Array) -> Array:
    """Masks ids >= `vocab_size_B` with -inf, except a row's eos; -1 in `eos_BE` is padding."""
    if vocab_size_B is None:
        return logits_BV
    ids_V = jnp.arange(logits_BV.shape[1])

    @jax.named_scope(RARE)
    def mask(logits_BV: Array) -> Array:
        is_there_BV = (ids_V < vocab_size_B[:, None]) | _mark(logits_BV, eos_BE)
        return jnp.where(is_there_BV, logits_BV, -jnp.inf)

    return _if_any(vocab_size_B < len(ids_V), mask, logits_BV)


def mask_early_eos(logits_BV: Array, min_tokens_B: Array | None, eos_BE: Array, step_B: Array) -> Array:
    """Masks a row's eos with -inf while it has fewer than `min_tokens_B` new tokens."""
    if min_tokens_B is None:
        return logits_BV
    is_early_B = step_B < min_tokens_B

    @jax.named_scope(RARE)
    def mask(logits_BV: Array) -> Array:
        return jnp.where(_mark(logits_BV, eos_BE) & is_early_B[:, None], -jnp.inf, logits_BV)

    return _if_any(is_early_B, mask, logits_BV)


def add_bias(logits_BV: Array, ids_BE: Array | None, bias_BE: Array | None) -> Array:
    """Adds `bias_BE` to the logits of `ids_BE`, padded with -1."""
    if ids_BE is None or bias_BE is None:
        return logits_BV

    @jax.named_scope(RARE)
    def add(logits_BV: Array) -> Array:
        return _at(logits_BV, ids_BE).add(bias_BE, mode="drop")

    return _if_any(ids_BE >= 0, add, logits_BV)


def penalize_repetition(logits_BV: Array, seen_BV: Array, penalty: Array | float) -> Array:
    """Makes tokens marked in `seen_BV` (bool) less likely: positive logits / penalty, negative logits * penalty.

    `penalty` is one number or [B]; 1 is off. The count of a token does not matter (CTRL, arXiv 1909.05858, section
    4.1).
    """
    penalty = jnp.reshape(penalty, (-1, 1))
    penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized, logits_BV)


def penalize_counts(
    logits_BV: Array, counts_BV: Array | None, presence_B: Array | None, frequency_B: Array | None
) -> Array:
    """Subtracts `presence_B` from logits of tokens in the output and `frequency_B` times their count (OpenAI's API)."""
    if presence_B is None or frequency_B is None:
        return logits_BV
    if counts_BV is None:
        raise ValueError("counts_BV = None is not valid: presence and frequency penalties need the counts.")
    # `where` keeps each product out of a fused multiply-subtract, which rounds differently and whose use depends on the
    # surrounding program.
    often_BV = jnp.where(counts_BV > 0, frequency_B[:, None] * counts_BV.astype(jnp.float32), 0)
    return logits_BV - often_BV - jnp.where(counts_BV > 0, presence_B[:, None], 0)


def _if_any(is_needed: Array, change: Callable[[Array], Array], x: Array) -> Array:
    return jax.lax.cond(jnp.any(is_needed), change, lambda x: x, x)


def _at(x_BV: Array, ids_BE: Array):
    B, V = x_BV.shape
    return x_BV.at[jnp.arange(B)[:, None], jnp.where(ids_BE < 0, V, ids_BE)]


def _mark(like_BV: Array, ids_BE: Array) -> Array:
    return _at(jnp.zeros_like(like_BV, bool), ids_BE).set(True, mode="drop")


# ------------------------------------------------------------------------------------------------------------ draws


def row_keys(seed_B: Array, step_B: Array, place_B: Array) -> Array:
    """One key per row, independent of the mesh, the batch size and other rows."""
    fold_in = jax.vmap(jax.random.fold_in)
    return fold_in(fold_in(jax.vmap(jax.random.key)(seed_B), step_B), place_B)


def sample_tokens(
    logits_BV: Array,
    keys_B: Array,
    *,
    temperature: Array | float | None,
    top_k: Array | int = 0,
    top_p: Array | float | None = None,
) -> Array:
    """Samples tokens, int32 [B]; row b uses `keys_B[b]`.

    temperature, top_k and top_p are one number or [B]. temperature 0 or None is greedy: the largest logit, the smallest
    id among equals. The top_k most likely tokens are kept (all for 0), then the fewest whose share of their probability
    reaches top_p (all for None or 1); the most likely token always stays. Among equal logits the smaller id comes
    first, so at most top_k are kept.
    """
    logits_BV = _tame(logits_BV)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if temperature is None:
        return greedy_B
    temperature_B, top_k_B, top_p_B = (
        jnp.broadcast_to(jnp.asarray(x, dtype), greedy_B.shape)
        for x, dtype in ((temperature, jnp.float32), (top_k, jnp.int32), (1 if top_p is None else top_p, jnp.float32))
    )
    is_few_B = (top_k_B > 0) & (top_k_B <= _FEW)

    def draw_few(greedy_B: Array) -> Array:
        ids_BK, weights_BK = few_candidates(logits_BV, temperature_B, top_k_B, top_p_B)
        chosen_B = jax.vmap(jax.random.categorical)(keys_B, weights_BK)
        return jnp.take_along_axis(ids_BK, chosen_B[:, None], axis=-1)[:, 0]

    @jax.named_scope(RARE)
    def draw_any(greedy_B: Array) -> Array:
        weights_BV = all_candidates(logits_BV, temperature_B, top_k_B, top_p_B, ~is_few_B & (temperature_B > 0))
        return jax.vmap(jax.random.categorical)(keys_B, weights_BV).astype(jnp.int32)

    few_B = _if_any(is_few_B & (temperature_B > 0), draw_few, greedy_B)
    any_B = _if_any(~is_few_B & (temperature_B > 0), draw_any, greedy_B)
    return jnp.where(temperature_B > 0, jnp.where(is_few_B, few_B, any_B), greedy_B)


def few_candidates(logits_BV: Array, temperature_B: Array, top_k_B: Array, top_p_B: Array) -> tuple[Array, Array]:
    """Candidates of rows with top_k in 1..64: ids int32 [B, K] and log-weights fp32 [B, K], -inf where cut off."""
    values_BK, ids_BK = jax.lax.top_k(logits_BV, min(_FEW, logits_BV.shape[-1]))
    first_K = jnp.arange(values_BK.shape[1])
    weights_BK = jnp.where(first_K < top_k_B[:, None], _log_weights(values_BK, temperature_B), -jnp.inf)
    reached_BK = jnp.cumsum(jnp.exp(weights_BK), axis=-1)
    before_BK = jnp.pad(reached_BK[:, :-1], ((0, 0), (1, 0)))
    # Explicit cases that rounding of the sum would get wrong: the first token at a tiny top_p, the last at 1.
    keep = (before_BK < top_p_B[:, None] * reached_BK[:, -1:]) | (first_K == 0) | (top_p_B >= 1)[:, None]
    return ids_BK, jnp.where(keep, weights_BK, -jnp.inf)


def all_candidates(logits_BV: Array, temperature_B: Array, top_k_B: Array, top_p_B: Array, is_drawn_B: Array) -> Array:
    """Candidates of rows with any top_k and top_p: log-weights fp32 [B, V], -inf where cut off.

    Cuts only if a row of `is_drawn_B` (bool) needs it. Both cuts keep the first tokens of an order; bisection finds its
    end without a sort.
    """
    V = logits_BV.shape[1]
    top_k_B = jnp.where((top_k_B <= 0) | (top_k_B > V), V, top_k_B)

    def cut_count(weights_BV: Array) -> Array:
        keep_BV = _first_reaching(logits_BV, lambda keep_BV: keep_BV.sum(axis=1, dtype=jnp.int32), top_k_B)
        return jnp.where(keep_BV, weights_BV, -jnp.inf)

    def cut_share(weights_BV: Array) -> Array:
        p_BV = jnp.exp(weights_BV)
        share = lambda keep_BV: _exact_sum(jnp.where(keep_BV, p_BV, 0))  # noqa: E731  # reads as what it is
        # At a tiny top_p the product would be 0, which keeps no token.
        target_B = jnp.maximum(top_p_B * _exact_sum(p_BV), 1e-30)
        keep_BV = _first_reaching(logits_BV, share, target_B) | (top_p_B >= 1)[:, None]
        return jnp.where(keep_BV, weights_BV, -jnp.inf)

    weights_BV = _log_weights(logits_BV, temperature_B)
    weights_BV = _if_any(is_drawn_B & (top_k_B < V), cut_count, weights_BV)
    return _if_any(is_drawn_B & (top_p_B < 1), cut_share, weights_BV)


def _tame(logits_BV: Array) -> Array:
    """Replaces -0.0, which some comparisons order below 0, by 0, and +inf, which a penalty can give, by the largest
    float.
    """
    return jnp.where(logits_BV == 0, 0, jnp.minimum(logits_BV, jnp.finfo(jnp.float32).max))


def _log_weights(logits_BV: Array, temperature_B: Array) -> Array:
    """(logits - the row's largest) / temperature.

    Subtracting first makes a tiny temperature give -inf beside one 0 instead of inf - inf. A temperature below the
    smallest normal number would be flushed to zero.
    """
    peak_B1 = logits_BV.max(axis=-1, keepdims=True)
    peak_B1 = jnp.where(peak_B1 == -jnp.inf, 0, peak_B1)
    return (logits_BV - peak_B1) / jnp.maximum(temperature_B, jnp.finfo(jnp.float32).tiny)[:, None]


def _order(x_BV: Array) -> Array:
    """uint32 [B, V] in the same order as these floats."""
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)


def _first_reaching(logits_BV: Array, measure: Callable[[Array], Array], target_B: Array) -> Array:
    """bool [B, V]: the fewest tokens whose measure reaches the target, taken by descending logit, smaller id first
    among equals; all tokens if it is never reached.

    `measure` ([B, V] bool -> [B]) must not decrease when tokens are added.
    """
    order_BV, ids_V = _order(logits_BV), jnp.arange(logits_BV.shape[1], dtype=jnp.uint32)

    def largest(bits: int, is_legal: Callable[[Array], Array]) -> Array:
        """Largest legal number of `bits` bits in each row, if all smaller numbers are legal."""

        def step(i: Array, found_B: Array) -> Array:
            larger_B = found_B | (jnp.uint32(1 << (bits - 1)) >> i.astype(jnp.uint32))
            return jnp.where(is_legal(larger_B), larger_B, found_B)

        return jax.lax.fori_loop(0, bits, step, jnp.zeros_like(order_BV[:, 0]))

    last_B = largest(32, lambda x_B: measure(order_BV >= x_B[:, None]) >= target_B)
    above_BV, equal_BV = order_BV > last_B[:, None], order_BV == last_B[:, None]
    count_B = largest(
        len(ids_V).bit_length(), lambda n_B: measure(above_BV | equal_BV & (ids_V < n_B[:, None])) < target_B
    )
    return above_BV | equal_BV & (ids_V <= count_B[:, None])


def _exact_sum(p_BV: Array) -> Array:
    """Row sums of numbers in 0..1 that do not depend on the order of summation, unlike float sums.

    So they never decrease when a number is added, and have the same bits for any batch size.
    """
    bits = 32 - p_BV.shape[1].bit_length()  # so that V ones do not overflow
    total_B, scale = jnp.zeros_like(p_BV[:, 0]), np.float32(2.0**bits)
    # Three rounds of bits per number: 45 bits for a vocabulary of 125,696. All products are exact.
    for place in range(1, 4):
        p_BV = p_BV * scale
        whole_BV = jnp.floor(p_BV)
        p_BV = p_BV - whole_BV
        total_B += whole_BV.astype(jnp.uint32).sum(axis=1).astype(jnp.float32) * np.float32(2.0 ** (-bits * place))
    return total_B


# ------------------------------------------------------------------------------------------------ log-probabilities


def chosen_log_probs(logits_BV: Array, token_B: Array, temperature_B: Array | None = None) -> Array:
    """fp32 [B]: log_softmax(logits / temperature) of the tokens; temperature None is 1.

    Pass the model's logits, before `next_token` changes them.
    """
    if temperature_B is not None:
        logits_BV = logits_BV / temperature_B[:, None]
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    peak_B, log_total_B = _normalizer(logits_BV)
    return logit_B - peak_B - log_total_B


def top_log_probs(logits_BV: Array, want_B: Array, k: int = MOST_TOP_LOG_PROBS) -> tuple[Array, Array]:
    """The k most likely tokens, int32 [B, k], and their log-probabilities, fp32 [B, k], the most likely first.

    Equals are ordered by id. `want_B` (bool) marks rows that ask; other rows get zeros, and if no row asks nothing is
    computed. If V < k the rest is id -1 with -inf. A token's log-probability has the same bits as in
    `chosen_log_probs`.
    """
    peak_B, log_total_B = _normalizer(logits_BV)

    @jax.named_scope(RARE)
    def find(logits_BV: Array) -> tuple[Array, Array]:
        K = min(k, logits_BV.shape[1])
        values_BK, ids_BK = jax.lax.top_k(jnp.where(logits_BV == 0, 0, logits_BV), K)
        found_BK = values_BK - peak_B[:, None] - log_total_B[:, None]
        pad = ((0, 0), (0, k - K))
        ids_BK = jnp.pad(ids_BK, pad, constant_values=-1)
        found_BK = jnp.pad(found_BK, pad, constant_values=-jnp.inf)
        return jnp.where(want_B[:, None], ids_BK, 0), jnp.where(want_B[:, None], found_BK, 0)

    def leave(logits_BV: Array) -> tuple[Array, Array]:
        none_BK = jnp.zeros_like(logits_BV, shape=(len(want_B), k))
        return none_BK.astype(jnp.int32), none_BK

    return jax.lax.cond(jnp.any(want_B), find, leave, logits_BV)


def _normalizer(logits_BV: Array) -> tuple[Array, Array]:
    """fp32 [B] each: the largest logit, and the log of the sum of exp(logit - largest)."""
    peak_B = logits_BV.max(axis=1)
    return peak_B, jnp.log(_exact_sum(jnp.exp(logits_BV - peak_B[:, None])))
