"""What the programs of `infer/engine.py` take and give: the state of a batch, chunks of prompts, what was chosen."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from jax import Array

from bc2_jax.infer.settings import Sampling
from bc2_jax.kernels.cached import KVCache

STEPS = 8
"""The most steps of one `decode`."""


class Reason(enum.IntEnum):
    """Why a row has ended, if it has."""

    RUNNING = 0
    EOS = 1
    """It has generated an eos of its own."""
    LIMIT = 2
    """It has as many new tokens as it may, or its slots of the cache are full."""
    NO_PROMPT = 3
    """It has none yet, or not the whole of it."""
    CANCELLED = 4
    """Its caller wants no further tokens of it."""


class Decoding(NamedTuple):
    """The state of B rows, each with its own length, settings, step and end. The programs consume the one they get.

    Small arrays are whole on every device and process.
    """

    cache: KVCache
    """Of S slots; the keys and values of the newest token are not in it yet."""
    length_B: Array
    """int32: slots in use."""
    seen_BV: Array
    """bool, cut by sampling (`engine.sampling_axis`): tokens of the prompt or the output."""
    counts_BV: Array | None
    """int16, cut as well: how often each token is in the output; None where no row may have a penalty for it."""
    token_B: Array
    """int32: the newest token, at position length_B."""
    step_B: Array
    """int32: new tokens of each row."""
    reason_B: Array
    """int8, of `Reason`."""
    sampling: Sampling
    stretch_B: Array | None
    """fp32: how far beyond the trained length each row's sequence may come (`LongContext`); None without it."""


class Chunk(NamedTuple):
    """The next C tokens of R prompts; arrays of the host.

    R is a multiple of the parts into which the mesh cuts the batch: place i of part p belongs to a row of part p. Where
    R is the rows of the batch, place i is row i.
    """

    ids_RC: Any
    """int32, padded on the right."""
    rows_R: Any
    """int32: the row of the batch that each belongs to."""
    start_R: Any
    """int32: slots that hold the tokens before these."""
    count_R: Any
    """int32: tokens, 0..C; 0 where there is nothing to do."""
    is_last_R: Any
    """bool: the prompt ends here, its first new token is chosen, and the row runs from now on."""
    prompt_RS: Any
    """int32: the whole prompt where it ends, padded with -1: what the repetition penalty sees."""
    stretch_R: Any | None = None
    """fp32, the same for all chunks of a prompt: `Prepared.stretch` of all its tokens, new ones included."""


class LogProbs(NamedTuple):
    """log_softmax of the fp32 logits as the model gave them: before penalties, temperature and cuts; nats.

    X are the dimensions of the tokens, P the most likely ones that are told; zeros where a row did not ask for them.
    """

    chosen_X: Array
    """Of the token, divided by `log_prob_temperature` before the softmax where that was given."""
    top_ids_XP: Array
    """int32, the most likely first."""
    top_XP: Array


class Emitted(NamedTuple):
    """What a program chose. Not consumed by the next one; whole on every process."""

    tokens_BK: Array
    """int32: the new tokens of each row in order, -1 where there are fewer than K = STEPS; of `extend` K = 1, and one
    row for each place of the chunk."""
    log_probs: LogProbs | None
    """Of these tokens; None where `Sampling.top_log_probs` is."""
    step_B: Array
    """int32: new tokens so far."""
    reason_B: Array
    """int8, of `Reason`."""
