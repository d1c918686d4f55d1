"""Makes the loss of chosen batches infinite or too large in an otherwise normal run."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from bc2_jax.data import row_batches
from bc2_jax.data.loader import make_train_loader
from bc2_jax.train import pretrain

POISON = 10**6
"""A position beyond all rows: marks a batch whose loss is not finite, or larger by what is added to it."""


def poison(factors: dict[int, float], set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Multiplies the loss of batches, numbered by the loader."""
    make_loss = pretrain.make_loss

    def make_poisoned_loss(*args):
        loss_fn = make_loss(*args)

        def poisoned_loss(params, frozen, batch):
            loss, parts = loss_fn(params, frozen, batch)
            marks = jnp.max(batch["positions"])
            factor = jnp.where(marks == POISON, jnp.nan, jnp.where(marks > POISON, (marks - POISON) * 1.0, 1.0))
            poisoned = {"cross_entropy": parts.sums["cross_entropy"] * factor}
            return loss * factor, parts._replace(sums=parts.sums | poisoned)

        return poisoned_loss

    def poison_rows(index, rows):
        if index not in factors:
            return rows
        mark = POISON if math.isnan(factors[index]) else POISON + int(factors[index])
        return rows | {"positions": np.full_like(rows["positions"], mark)}

    def make(*args, **kwargs):
        return make_train_loader(*args, **kwargs).map_with_index(poison_rows)

    set_attribute(pretrain, "make_loss", make_poisoned_loss)
    set_attribute(row_batches, "make_train_loader", make)
