"""The training step and the evaluation step, as functions of arrays only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from bc2_jax.config import ComputeConfig, ModelConfig, TrainConfig
from bc2_jax.data.batch import Batch
from bc2_jax.model.baichuan import Params, split_model
from bc2_jax.train.health import batch_checksum, keep_unless, norm_metrics
from bc2_jax.train.loss import LossSums, count_targets, head_loss
from bc2_jax.train.optimizer import make_optimizer, make_schedule


class TrainState(NamedTuple):
    params: Params
    """fp32 master weights."""
    opt_state: Any
    step: Array
    """Updates done, int32 scalar; a skipped one is none."""


def init_state(params: Params, config: TrainConfig) -> TrainState:
    """The state before the first update; the moments are laid out as the parameters."""
    init = jax.jit(lambda params: make_optimizer(config.optimizer).init(params))
    return TrainState(params, init(params), jnp.zeros((), jnp.int32))


def make_loss_fn(model: ModelConfig, compute: ComputeConfig) -> Callable[[Params, Batch], tuple[Array, LossSums]]:
    """(params, one micro-batch [B, T]) -> (sum of the loss over its valid targets, its parts)."""
    graphdef, _, _ = split_model(model, compute)

    def loss_fn(params: Params, batch: Batch) -> tuple[Array, LossSums]:
        module = nnx.merge(graphdef, params)
        h_BTD, _ = module.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
        rows_VD = module.lm_head.rows()
        return head_loss(h_BTD, rows_VD, batch["labels"], model.z_loss_weight, compute.loss_chunk)

    return loss_fn


def make_train_step(config: TrainConfig) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """(state, batch) -> (state after one update, metrics). Every valid target of the batch has the same weight.

    If the loss or the gradients' norm is not finite, the state is returned as it was.
    """
    loss_fn = make_loss_fn(config.model, config.compute)
    optimizer, schedule = make_optimizer(config.optimizer), make_schedule(config.optimizer)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        total = jnp.maximum(count_targets(batch["labels"]), 1.0)

        def mean_loss(params: Params, batch: Batch) -> tuple[Array, LossSums]:
            loss, sums = loss_fn(params, batch)
            return loss / total, sums

        def accumulate(carry, batch: Batch):
            (_, sums), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params, batch)
            return (jax.tree.map(jnp.add, carry[0], grads), carry[1].plus(sums)), None

        if batch["labels"].shape[0] == 1:
            first = jax.tree.map(lambda x: x[0], batch)
            (_, sums), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params, first)
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params), LossSums.zeros()
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            grad_norm = optax.tree.norm(grads)
            metrics = mean_metrics(sums, config.model.z_loss_weight)
            metrics |= {"grad_norm": grad_norm, "learning_rate": schedule(state.step)}
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
            new_state = keep_unless(finite, TrainState(params, opt_state, state.step + 1), state)
        metrics["batch_checksum"] = batch_checksum(batch)
        if config.health.norms:
            metrics |= norm_metrics(new_state.params, updates, finite)
        return new_state, metrics

    return train_step


def make_eval_step(config: TrainConfig) -> Callable[[Params, Batch], LossSums]:
    """(params, batch [A, B, T]) -> sums over its valid targets."""
    loss_fn = make_loss_fn(config.model, config.compute)

    def eval_step(params: Params, batch: Batch) -> LossSums:
        _, sums = jax.lax.scan(lambda _, micro: (None, loss_fn(params, micro)[1]), None, batch)
        return jax.tree.map(jnp.sum, sums)._replace(largest_logit=jnp.max(sums.largest_logit))

    return eval_step


def mean_metrics(sums: LossSums, z_loss_weight: float) -> dict[str, Any]:
    """Sums over valid targets -> means: loss and its parts, accuracy, and the number of targets."""
    total = jnp.maximum(sums.tokens, 1.0)
    return {
        "loss": (sums.cross_entropy + z_loss_weight * sums.max_z) / total,
        "cross_entropy": sums.cross_entropy / total,
        "max_z": sums.max_z / total,
        "max_logit": sums.max_logit / total,
        "largest_logit": sums.largest_logit,
        "accuracy": sums.correct / total,
        "tokens": sums.tokens,
    }
