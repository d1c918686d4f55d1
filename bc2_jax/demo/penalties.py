"""Measures how large the logits of models are and what a repetition penalty does to them; a program of `bc2 paper`.

python -m bc2_jax.demo.penalties OUT.json --rows ROWS MODEL...

Uses held-out rows. The penalty r is that of transformers, which divides positive logits of earlier tokens by r and
multiplies negative ones; the result therefore depends on the size and offset of the logits (paper, section 2.4).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bc2_jax.convert.pretrained import load_pretrained
from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.data.packing import iterate_rows
from bc2_jax.data.row_stream import find_sources
from bc2_jax.files import replaced

PENALTIES = (1.05, 1.1, 1.3)
ROWS = 16


def penalize(logits_BTV: Array, ids_BT: Array, penalty: float) -> Array:
    """The logits after a repetition penalty for all tokens up to each position, fp32 [B, T, V]."""
    seen_BTV = jnp.cumsum(jax.nn.one_hot(ids_BT, logits_BTV.shape[-1], dtype=jnp.int32), axis=1) > 0
    return jnp.where(seen_BTV, jnp.where(logits_BTV > 0, logits_BTV / penalty, logits_BTV * penalty), logits_BTV)


@jax.jit
def compare(logits_BTV: Array, ids_BT: Array, labels_BT: Array) -> dict[str, Any]:
    """Means over all positions: the largest logit, and for each penalty the KL divergence in nats, the share of changed
    arg-maxes and the loss of the labels before and after."""
    log_p = jax.nn.log_softmax(logits_BTV)

    def loss(log_probs: Array) -> Array:
        return -jnp.take_along_axis(log_probs, labels_BT[..., None], -1).mean()

    def of(penalty: float) -> dict[str, Array]:
        log_q = jax.nn.log_softmax(penalize(logits_BTV, ids_BT, penalty))
        return {
            "kl": (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
            "changed": (log_p.argmax(-1) != log_q.argmax(-1)).mean(),
            "loss": loss(log_q),
        }

    return {
        "largest_logit": logits_BTV.max(-1).mean(), "mean_logit": logits_BTV.mean(), "std": logits_BTV.std(-1).mean(),
        "loss": loss(log_p), "penalties": {str(penalty): of(penalty) for penalty in PENALTIES},
    }  # fmt: skip


def held_out_rows(folder: str) -> np.ndarray:
    """At most ROWS held-out rows of packed text, int32 [rows, length + 1], evenly spaced over all sources."""
    rows = np.concatenate(
        [part for source in find_sources([folder]) for part in iterate_rows(source.path, "validation")]
    )
    return rows[:: -(-len(rows) // ROWS)].astype(np.int32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", required=True)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    args = parser.parse_args(argv)
    choose_cpu_without_tpu()
    rows = held_out_rows(args.rows)
    ids, labels = rows[:, :-1], rows[:, 1:]
    found = {}
    for model in args.models:
        logits = load_pretrained(model, dtype="float32")(jnp.asarray(ids))
        found[os.path.basename(model)] = jax.tree.map(float, compare(logits, ids, labels))
    with replaced(args.out) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
