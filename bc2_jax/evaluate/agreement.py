"""Compares a changed (such as quantized) model with its reference: KL divergence, top-1 agreement, perplexity.

For each scored token: KL(reference || changed) over the vocabulary in nats, whether both have the same most likely
token, and log p of the next token. The reference runs first and leaves its hidden states [B, T, D] on the host, so that
it may be donated to make the changed model. Both heads are then applied to a few tokens at a time: no [B, T, V] tensor
exists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from bc2_jax.data.batch import IGNORED, Rows
from bc2_jax.evaluate.encoding import cut_windows
from bc2_jax.evaluate.perplexity import ratio
from bc2_jax.model.baichuan import Baichuan2, Params
from bc2_jax.model.head_chunks import NO_TOKEN, HeadPart, cut_tokens, join_tokens, over
from bc2_jax.sharding import from_host, named_sharding, reshard, spec, to_host, use_mesh_of
from bc2_jax.tokenizer import Tokenizer

CHUNK = 256  # tokens per device to which both heads are applied at a time


class Agreement(NamedTuple):
    """Means over all scored tokens."""

    tokens: int
    kl: float  # KL(reference || changed), nats per token
    kl_stderr: float  # standard error of `kl` over rows; nan for fewer than two
    same_top: float  # share of tokens with the same most likely next token
    reference_nats: float  # cross-entropy per token
    changed_nats: float

    @property
    def reference_perplexity(self) -> float:
        return math.exp(self.reference_nats)

    @property
    def changed_perplexity(self) -> float:
        return math.exp(self.changed_nats)


class Reference(NamedTuple):
    """A model's hidden states of some rows."""

    rows: list[Rows]
    hidden: list[np.ndarray]  # [B, T, D] for each of `rows`
    head_VD: Array  # its head in the compute dtype


def rows_of_texts(
    tokenizer: Tokenizer, texts: Iterable[str], *, length: int, rows: int, tokens: int, prefix_id: int
) -> list[Rows]:
    """Packs the first `tokens` tokens of texts into batches of [rows, length].

    Each window begins with `prefix_id` or the last token of the previous one (`encoding.cut_windows`) and is a segment
    of its own. The last batch is padded.
    """
    packed: list[list[tuple[Sequence[int], Sequence[int]]]] = []
    free, left = 0, tokens
    for text in texts:
        if left <= 0:
            break
        ids = tokenizer.encode(text)[:left]
        left -= len(ids)
        for context, continuation in cut_windows(ids, prefix_id, length, length):
            fed = [*context, *continuation[:-1]]
            if len(fed) > free:
                packed.append([])
                free = length
            packed[-1].append((fed, continuation))
            free -= len(fed)
    return [_batch(packed[first : first + rows], rows, length) for first in range(0, len(packed), rows)]


def _batch(packed: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], rows: int, length: int) -> Rows:
    ids, segments = (np.zeros((rows, length), np.int32) for _ in range(2))
    labels = np.full((rows, length), IGNORED, np.int32)
    for row, windows in enumerate(packed):
        start = 0
        for segment, (fed, continuation) in enumerate(windows, 1):
            end = start + len(fed)
            ids[row, start:end], segments[row, start:end] = fed, segment
            labels[row, end - len(continuation) : end] = continuation
            start = end
    return {"input_ids": ids, "segment_ids": segments, "labels": labels}


def run_reference(model: Baichuan2, batches: Iterable[Rows]) -> Reference:
    """The hidden states of `batches`, whose rows must be divisible by the batch shards of the mesh."""
    rows = list(batches)
    with use_mesh_of(model.norm.weight[...]):
        # A copy, as the model may be donated.
        head_VD = jnp.array(model.lm_head.rows(), model.compute.dtype, copy=True)
        return Reference(rows, [to_host(h_BTD) for h_BTD in _hidden_states(model, rows)], head_VD)


def compare(reference: Reference, changed: Baichuan2) -> Agreement:
    """The agreement of a model with a reference of the same vocabulary and mesh. Raises ValueError without tokens."""
    found: list[np.ndarray] = []
    with use_mesh_of(changed.norm.weight[...]):
        changed_VD = changed.lm_head.rows().astype(changed.compute.dtype)
        hidden = zip(reference.rows, reference.hidden, _hidden_states(changed, reference.rows), strict=True)
        for rows, reference_BTD, changed_BTD in hidden:
            labels_BT = rows["labels"]
            of_tokens = _compare(
                *from_host((reference_BTD, labels_BT)), reference.head_VD, changed_BTD, changed_VD, chunk=CHUNK
            )
            figures = np.stack([to_host(x) for x in of_tokens]).astype(np.float64)
            found += [figures[:, row, labels_BT[row] != IGNORED] for row in range(len(labels_BT))]
    kept = [figures for figures in found if figures.size]
    if not kept:
        raise ValueError("The text is empty: there are no tokens on which to compare the models.")
    counts = [figures.shape[1] for figures in kept]
    kl, *others = (ratio([float(figures[i].sum()) for figures in kept], counts) for i in range(4))
    return Agreement(sum(counts), kl.value, kl.stderr, *(other.value for other in others))


def _hidden_states(model: Baichuan2, batches: Iterable[Rows]) -> Iterator[Array]:
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    for rows in batches:
        yield _run(graphdef, params, *from_host((rows["input_ids"], rows["segment_ids"])))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: Any, params: Params, ids_BT: Array, segments_BT: Array) -> Array:
    return nnx.merge(graphdef, params).hidden_states(ids_BT, None, segments_BT)


@functools.partial(jax.jit, static_argnames="chunk")
def _compare(
    reference_BTD: Array, labels_BT: Array, reference_VD: Array, changed_BTD: Array, changed_VD: Array, *, chunk: int
) -> tuple[Array, ...]:
    """Replicated fp32 [B, T]: KL, whether both have the same top token, -log p of the label by each."""
    local = functools.partial(_compare_own, chunk=chunk, on_mesh=named_sharding() is not None)
    tokens, hidden, head = ("batch", "sequence"), ("batch", "sequence", "hidden"), ("vocab", "embed")
    layout = (hidden, tokens, head, hidden, head)
    given = (reference_BTD, labels_BT, reference_VD, changed_BTD, changed_VD)
    arguments = [reshard(x, *axes) for x, axes in zip(given, layout, strict=True)]
    if named_sharding() is None:
        return local(*arguments)
    in_specs = tuple(spec(*axes) for axes in layout)
    found = jax.shard_map(local, in_specs=in_specs, out_specs=spec(*tokens))(*arguments)
    return tuple(reshard(x, None, None) for x in found)


def _compare_own(reference_BTD, labels_BT, reference_VD, changed_BTD, changed_VD, *, chunk, on_mesh):
    """One device's tokens with its vocabulary shard."""
    heads = [HeadPart.gather(rows_VD, on_mesh) for rows_VD in (reference_VD, changed_VD)]
    axes = heads[0].vocab_axes

    def add(x_TV: Array) -> Array:
        return over(jax.lax.psum, x_TV.sum(-1), axes)

    def run_chunk(_, inputs):
        *hidden, labels_T = inputs
        is_token_V = heads[0].ids_V != NO_TOKEN
        logits, log_probs = [], []
        for head, h_TD in zip(heads, hidden, strict=True):
            logits_TV = head.logits(h_TD)
            shifted_TV = logits_TV - head.largest(logits_TV)[:, None]
            logits.append(logits_TV)
            log_probs.append(shifted_TV - jnp.log(add(jnp.exp(shifted_TV)))[:, None])
        difference_TV = jnp.where(is_token_V, log_probs[0] - log_probs[1], 0)
        kl_T = add(jnp.exp(log_probs[0]) * difference_TV)
        tops = [_argmax(head, logits_TV) for head, logits_TV in zip(heads, logits, strict=True)]
        is_label_TV = heads[0].is_label(labels_T)
        nats = [add(jnp.where(is_label_TV, -log_prob_TV, 0)) for log_prob_TV in log_probs]
        return None, (kl_T, (tops[0] == tops[1]).astype(kl_T.dtype), *nats)

    chunks = (cut_tokens(reference_BTD, chunk), cut_tokens(changed_BTD, chunk), cut_tokens(labels_BT, chunk, IGNORED))
    _, found = jax.lax.scan(run_chunk, None, chunks)
    return tuple(join_tokens(x_CT, *labels_BT.shape) for x_CT in found)


def _argmax(head: HeadPart, logits_TV: Array) -> Array:
    """[T]: the token with the largest logit, the first if tied."""
    is_max_TV = logits_TV == head.largest(logits_TV)[:, None]
    return over(jax.lax.pmin, jnp.where(is_max_TV, head.ids_V, NO_TOKEN).min(-1), head.vocab_axes)
