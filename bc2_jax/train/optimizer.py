"""AdamW as in the paper (section 2.4): warm-up and cosine schedule, clipping, decay on all but norm weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bc2_jax.config import OptimizerConfig
from bc2_jax.train import moments


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of the n-th update, n from 0: linear to the peak, cosine to the minimum, then constant."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.peak_learning_rate, config.warmup_steps, config.decay_steps, config.min_learning_rate
    )
    # The first update has 1 / warmup_steps of the peak; with rate 0 a batch would be wasted.
    return lambda count: schedule(count + 1)


def is_decayed(path: tuple, _: object) -> bool:
    """Whether the parameter at this tree path has weight decay: all but the weights of norms."""
    return not any("norm" in str(getattr(key, "key", key)) for key in path)


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Optax's Adam with both moments stored in `moment_dtype`; arithmetic is fp32."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    dtype = config.moment_dtype
    if dtype == "float32":
        return adam

    def init(params):
        state = adam.init(params)
        mu, nu = (
            jax.tree.map_with_path(functools.partial(moments.zeros, dtype=dtype, signed=signed), params)
            for signed in (True, False)
        )
        return state._replace(mu=mu, nu=nu)

    def update(updates, state, params=None):
        state = state._replace(mu=moments.load(state.mu), nu=moments.load(state.nu))
        updates, state = adam.update(updates, state, params)

        def store(path, mu, nu):
            bits = moments.random_bits(path, mu, state.count) if config.stochastic_rounding else None
            return moments.store(path, mu, dtype, True, bits), moments.store(path, nu, dtype, False, bits)

        paths, treedef = jax.tree.flatten_with_path(state.mu)
        pairs = [store(path, mu, nu) for (path, mu), nu in zip(paths, jax.tree.leaves(state.nu), strict=True)]
        mu, nu = (treedef.unflatten(leaves) for leaves in zip(*pairs, strict=True))
        return updates, state._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


class Optimizer(NamedTuple):
    """An optax.GradientTransformation with its learning rate."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: optax.Schedule
    """Of the n-th update, n from 0."""


def make_optimizer(config: OptimizerConfig) -> Optimizer:
    """Clip by global norm, Adam, decoupled weight decay, learning rate."""
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


class PartsState(NamedTuple):
    """The state of `combine_optimizers`."""

    count: Array  # type: ignore[assignment]  # tuples have a method of this name
    """Updates, int32 scalar; first in the tree, before the counts of the parts."""
    parts: dict[str, Any]


def combine_optimizers(parts: Mapping[str, Optimizer], wait: Mapping[str, int] | None = None) -> Optimizer:
    """One optimizer for parameters {name: tree}; each part has its own clipping, moments and rate.

    A part named in `wait` keeps its parameters and state for that many updates. The reported learning rate is that of
    the first part, even while it waits.
    """
    wait = {} if wait is None else wait

    def init(params: Any) -> PartsState:
        return PartsState(jnp.zeros((), jnp.int32), {name: part.init(params[name]) for name, part in parts.items()})

    def update(updates: Any, state: PartsState, params: Any = None) -> tuple[Any, PartsState]:
        changes, states = {}, {}
        for name, part in parts.items():
            change, new = part.update(updates[name], state.parts[name], params[name])
            if name in wait:
                acts = state.count >= wait[name]
                change = jax.tree.map(lambda x, acts=acts: jnp.where(acts, x, 0), change)
                new = jax.tree.map(lambda x, old, acts=acts: jnp.where(acts, x, old), new, state.parts[name])
            changes[name], states[name] = change, new
        return changes, PartsState(state.count + 1, states)

    first = next(iter(parts.values()))
    return Optimizer(init, update, first.learning_rate)  # type: ignore[arg-type]  # optax's types know no parts
