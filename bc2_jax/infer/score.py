"""The device program of scoring: rows of tokens -> log-probabilities of given tokens at given positions.

A row may hold several documents, each a trunk with branches (`kernels.segments`), so a prefix shared by many requests
is computed once. Only hidden states of scored positions meet the head, chunk by chunk: no [B, T, V] tensor exists.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from bc2_jax.data.batch import IGNORED
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.model.log_probs import token_log_probs
from bc2_jax.sharding import current_chip, from_host, named_sharding, parts, reshard, spec, use_mesh_of
from bc2_jax.tpu.options import Value, compiler_options

ATTENTION_BLOCK = 128
"""Largest block of chunked attention; small enough that blocks of other branches are skipped."""


class Rows(NamedTuple):
    """B rows of T tokens with S scored positions each; int32 arrays on the host or the device.

    B must be a multiple of the batch shards, T and S of the sequence shards.
    """

    ids_BT: Any
    segments_BT: Any  # as `kernels.segments` reads them; 0 is padding
    places_BS: Any  # columns, 0..T-1, whose next token is scored; a column may occur several times with other labels
    labels_BS: Any  # the tokens to score; IGNORED where nothing is scored


class Scores(NamedTuple):
    """[B, S], replicated on every device and process."""

    log_prob: Array  # fp32 log p(label) in nats; 0 where the label is IGNORED
    is_argmax: Array  # bool: whether the label has the largest logit, the first of equals
    margin: Array  # fp32: the label's logit minus the largest other logit


def score_rows(model: Baichuan2, rows: Rows) -> Scores:
    """Scores `rows` with `model`, with or without a mesh, in fp32 from the logits on.

    Compiled once per row shape and kind of model. All processes call it with the same rows. Raises ValueError for
    shapes that the mesh does not divide.
    """
    graphdef, state = nnx.split(model)
    weight = model.norm.weight[...]
    with use_mesh_of(weight):
        check_shapes(rows)
        return program(model)(graphdef, nnx.to_pure_dict(state), from_host(rows))


def check_shapes(rows: Rows) -> None:
    """Raises ValueError for rows that the current mesh does not divide."""
    (B, T), S = rows.ids_BT.shape, rows.places_BS.shape[1]
    for name, size, axis in (("rows", B, "batch"), ("columns", T, "sequence"), ("places", S, "sequence")):
        if size % parts(axis):
            raise ValueError(f"{size} {name} are not valid: the mesh needs a multiple of {parts(axis)}.")


def program(model: Baichuan2) -> Any:
    """The jitted (graphdef, parameters, rows) -> Scores, on a TPU with the model's compiler options."""
    chip = current_chip()
    if chip is None or model.compute.compiler_options == "default":
        return make_program()
    return make_program(**compiler_options(chip, inference=True))


@functools.cache
def make_program(**options: Value) -> Any:
    """The program, jitted once per set of compiler options."""
    return jax.jit(_run, static_argnums=0, compiler_options=options)


def _run(graphdef: Any, params: Params, rows: Rows) -> Scores:
    model = nnx.merge(graphdef, params)
    attention = model.layers.self_attn
    block = min(attention.compute.attention_block, ATTENTION_BLOCK)
    attention.compute = dataclasses.replace(attention.compute, attention_block=block)
    h_BTD = model.hidden_states(rows.ids_BT, None, rows.segments_BT)
    places_BS, labels_BS = (reshard(x, "batch", "sequence") for x in (rows.places_BS, rows.labels_BS))
    found = token_log_probs(_take(h_BTD, places_BS), model.lm_head.rows(), labels_BS, model.compute.loss_chunk)
    is_argmax = (found.argmax == labels_BS) & (labels_BS != IGNORED)
    return Scores(*(reshard(x, None, None) for x in (found.log_prob, is_argmax, found.margin)))


def _take(h_BTD: Array, places_BS: Array) -> Array:
    """[B, S, D]: hidden states at the scored positions; each device takes those of its own rows."""

    def take(h_BTD: Array, places_BS: Array) -> Array:
        return jnp.take_along_axis(h_BTD, places_BS[..., None], axis=1)

    h_BTD = reshard(h_BTD, "batch", None, "hidden")
    if named_sharding() is None:
        return take(h_BTD, places_BS)
    rows, hidden = spec("batch", "sequence"), "hidden"
    return jax.shard_map(
        take, in_specs=(spec("batch", None, hidden), rows), out_specs=spec("batch", "sequence", hidden)
    )(h_BTD, places_BS)


def empty_rows(rows: int, columns: int, places: int) -> Rows:
    """Host rows of padding, to be filled in."""
    ids, segments = (np.zeros((rows, columns), np.int32) for _ in "is")
    return Rows(ids, segments, np.zeros((rows, places), np.int32), np.full((rows, places), IGNORED, np.int32))
