"""Generation settings of one prompt, checked, and their arrays for the rows of a batch."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from bc2_jax.config import ModelConfig
from bc2_jax.validation import require

MOST_EOS = 16
"""Most ids that may end a row; compiled programs have room for that many."""
MOST_BIASES = 300
"""Most ids of a row that may have a bias, as in OpenAI's API; compiled programs have room for that many."""
MOST_TOP_LOG_PROBS = 20
"""Most of the likeliest tokens reported with each token, as in OpenAI's API."""
SEEDS = range(2**32)
"""32-bit integers: JAX would drop the upper bits of a larger seed."""


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
    """The id or ids that end the continuation. None uses the model's; an empty list never ends it."""
    vocab_size: int | None = None
    """Ids from this one on are never sampled, except eos: a model's vocabulary may be larger than its tokenizer's,
    whose `vocab_size` belongs here. None allows every id of the model.
    """
    presence_penalty: float = 0.0
    """-2 to 2: subtracted from the logit of each token already in the continuation; 0 is off."""
    frequency_penalty: float = 0.0
    """-2 to 2: subtracted from a token's logit once per occurrence in the continuation; 0 is off."""
    logit_bias: Mapping[int, float] | None = None
    """Id -> bias of -100 to 100, added to its logit before the penalties. It cannot make a masked id legal."""
    min_tokens: int = 0
    """The first `min_tokens` new tokens are never an `eos_token_id`."""

    def check(self, config: ModelConfig) -> Settings:
        """The settings as plain numbers, with the model's eos filled in and `eos_token_id` as a tuple.

        Raises ValueError for a value of another type or out of range.
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
        size = None if size is None or size >= V else size
        min_tokens = whole("min_tokens", lambda n: n >= 0, "at least 0")
        has_others = any(i not in eos for i in range(min(size or V, MOST_EOS + 1)))
        legal = "0 where every id that may be chosen is an eos_token_id"
        _require(min_tokens == 0 or has_others, "min_tokens", min_tokens, legal)
        return Settings(
            max_new_tokens=whole("max_new_tokens", lambda n: n >= 1, "at least 1"),
            temperature=real("temperature", lambda x: 0 <= x < math.inf, "finite and at least 0, which is greedy"),
            top_k=whole("top_k", lambda n: n >= 0, "at least 0, which keeps all"),
            top_p=real("top_p", lambda x: 0 < x <= 1, "in (0, 1]; 1 keeps all"),
            repetition_penalty=real("repetition_penalty", lambda x: 0 < x < math.inf, "positive and finite"),
            seed=whole("seed", lambda n: n in SEEDS, "0 to 2^32 - 1"),
            eos_token_id=tuple(map(operator.index, eos)),
            vocab_size=size,
            presence_penalty=real("presence_penalty", lambda x: -2 <= x <= 2, "-2 to 2"),
            frequency_penalty=real("frequency_penalty", lambda x: -2 <= x <= 2, "-2 to 2"),
            logit_bias=_check_bias(self.logit_bias, V),
            min_tokens=min_tokens,
        )


def _check_bias(given: Any, V: int) -> dict[int, float] | None:
    legal = f"None, or at most {MOST_BIASES} ids in 0..{V - 1}, each with a number, -100 to 100"
    if given is None:
        return None
    _require(isinstance(given, Mapping) and len(given) <= MOST_BIASES, "logit_bias", given, legal)
    for i, bias in given.items():
        ok = is_whole(i) and 0 <= i < V and _is_real(bias) and -100 <= _as_float32(bias) <= 100
        _require(ok, "logit_bias", given, legal)
    return {operator.index(i): float(bias) for i, bias in given.items()} or None


def is_whole(value: object) -> bool:
    """Whether `value` is an integer of Python, numpy or JAX; bools are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) or _is_scalar(value, np.integer)


def _is_real(value: object) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating) or _is_scalar(value, np.floating)


def _as_float32(value: Any) -> float:
    """`value` as the device gets it: overflow is infinite."""
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    except OverflowError:  # an integer beyond float64
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
"""An array with one value per row, of JAX or numpy."""


class Sampling(NamedTuple):
    """The settings of B rows. Values do not affect compiled shapes; which fields are None does.

    A field that is None gives the same bits as one with the neutral value.
    """

    temperature: Rows
    """fp32 [B]; 0 is greedy."""
    top_k: Rows
    """int32 [B]; 0 keeps all."""
    top_p: Rows
    """fp32 [B]; 1 keeps all."""
    repetition_penalty: Rows
    """fp32 [B]."""
    eos_token_id: Rows
    """int32 [B, MOST_EOS], padded with -1: each of them ends the row."""
    seed: Rows
    """uint32 [B]."""
    place: Rows
    """int32 [B]: index of the prompt in its caller's list. Seed, step and place determine the key of a draw."""
    limit: Rows
    """int32 [B]: most new tokens."""
    vocab_size: Rows | None = None
    """int32 [B]: ids from here on are sampled only as an eos; None allows every id."""
    min_tokens: Rows | None = None
    """int32 [B]: none of the first `min_tokens` tokens is an eos; None is 0 for all rows."""
    presence_penalty: Rows | None = None
    """fp32 [B]; None is 0 for all rows, as for frequency_penalty."""
    frequency_penalty: Rows | None = None
    """fp32 [B]."""
    bias_ids: Rows | None = None
    """int32 [B, MOST_BIASES], different ids padded with -1; None for no bias."""
    bias: Rows | None = None
    """fp32 [B, MOST_BIASES], of bias_ids."""
    log_prob_temperature: Rows | None = None
    """fp32 [B]: divides the logits before log-probabilities are taken; None is 1 for all rows."""
    top_log_probs: Rows | None = None
    """int32 [B]: how many of the most likely tokens to report, 0 to MOST_TOP_LOG_PROBS; -1 reports no log-probabilities
    at all. None is -1 for all rows.
    """


def sampling_of(
    settings: Sequence[Settings],
    places: Sequence[int],
    log_prob_temperature: float = 1.0,
    *,
    top_log_probs: Sequence[int | None] | None = None,
    full: bool = False,
) -> Sampling:
    """Host arrays for rows with these checked settings and places.

    `top_log_probs` has 0..MOST_TOP_LOG_PROBS or None for each row. Fields that no row uses are None, unless `full` asks
    for every field that a server request can set (all but log_prob_temperature), so that one program serves all
    requests.
    """

    def column(name: str, dtype) -> np.ndarray:
        values = [getattr(row, name) for row in settings]
        # A limit beyond the dtype's range has no effect.
        return np.array([min(x, np.iinfo(dtype).max) for x in values] if dtype == np.int32 else values, dtype)

    def used(array: np.ndarray, neutral: float) -> np.ndarray | None:
        return array if full or (array != neutral).any() else None

    B = len(settings)
    eos_token_id = np.full((B, MOST_EOS), -1, np.int32)
    bias_ids, bias = np.full((B, MOST_BIASES), -1, np.int32), np.zeros((B, MOST_BIASES), np.float32)
    for b, row in enumerate(settings):
        assert isinstance(row.eos_token_id, tuple)  # as `check` leaves it
        eos_token_id[b, : len(row.eos_token_id)] = row.eos_token_id
        if row.logit_bias:
            bias_ids[b, : len(row.logit_bias)] = list(row.logit_bias)
            bias[b, : len(row.logit_bias)] = list(row.logit_bias.values())
    has_counts = full or any(row.presence_penalty or row.frequency_penalty for row in settings)
    has_bias = full or any(row.logit_bias for row in settings)
    top = np.array([-1 if n is None else n for n in top_log_probs or [None] * B], np.int32)
    return Sampling(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        eos_token_id=eos_token_id,
        seed=column("seed", np.uint32),
        place=np.array(places, np.int32),
        limit=column("max_new_tokens", np.int32),
        vocab_size=used(np.array([row.vocab_size or _ALL for row in settings], np.int32), _ALL),
        min_tokens=used(column("min_tokens", np.int32), 0),
        presence_penalty=column("presence_penalty", np.float32) if has_counts else None,
        frequency_penalty=column("frequency_penalty", np.float32) if has_counts else None,
        bias_ids=bias_ids if has_bias else None,
        bias=bias if has_bias else None,
        log_prob_temperature=None if log_prob_temperature == 1 else np.full(B, log_prob_temperature, np.float32),
        top_log_probs=used(top, -1),
    )
