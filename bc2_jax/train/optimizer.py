"""AdamW as the paper's (section 2.4): warm-up and cosine, clipping, decay on all but norm weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bc2_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of the n-th update, n from 0: linear to the peak, cosine to the minimum, constant after."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_learning_rate, config.warmup_steps, config.decay_steps, config.min_learning_rate
    )
    # The first update has 1 / warmup_steps of the peak; with 0 a whole batch would be spent on nothing.
    return lambda count: schedule(count + 1)


def is_decayed(path: tuple, _: object) -> bool:
    """Whether a parameter at this tree path has weight decay: all but the norms' weights."""
    return not any("norm" in str(getattr(key, "key", key)) for key in path)


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Optax's Adam with both moments stored in `moment_dtype`; the arithmetic is fp32."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.moment_dtype == "float32":
        return adam

    def cast(state: optax.ScaleByAdamState, dtype: str) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.cast(state.mu, jnp.dtype(dtype)), optax.tree.cast(state.nu, jnp.dtype(dtype))
        return state._replace(mu=mu, nu=nu)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, cast(state, "float32"), params)
        return updates, cast(state, config.moment_dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), config.moment_dtype), update)


class Optimizer(NamedTuple):
    """An optax.GradientTransformation that tells its learning rate."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: optax.Schedule
    """Of the n-th update, n from 0."""


def make_optimizer(config: OptimizerConfig) -> Optimizer:
    """Gradients -> updates: clip by global norm, Adam, decoupled weight decay, learning rate."""
    schedule = make_schedule(config)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: jax.tree_util.tree_map_with_path(is_decayed, params)
        ),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(chain.init, chain.update, schedule)
