"""The models of reinforcement learning: actor, reference, reward model and critic, and their forward passes.

Trained parameters are {"actor": ..., "critic": ...}; GRPO has only the actor. Without adapters each is a whole model.
With adapters the actor is an adapter, the critic {"adapter", "score"}, and the frozen parameters are {"actor",
"critic"}: the chat model, which without its adapter is the reference, and the backbone of the reward model. Reference
and reward model share these arrays, so there is one copy of each model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from bc2_jax.align.tuning import label_log_probs, merge_model, merge_reward_model
from bc2_jax.config import ModelConfig, RLConfig
from bc2_jax.convert.checkpoints import ACTOR, CRITIC
from bc2_jax.convert.pretrained import load_params
from bc2_jax.convert.reward import ADAPTER, find_reward_model, load_backbone, load_reward_model
from bc2_jax.data.batch import FIELDS, Batch
from bc2_jax.model.baichuan import Baichuan2, Params, abstract_params, split_model
from bc2_jax.model.lora import abstract_adapter, init_adapter
from bc2_jax.model.reward import (
    SCORE,
    RewardModel,
    abstract_reward_params,
    backbone_of,
    init_score,
    split_reward_model,
)
from bc2_jax.sharding import reshard

Forward = Callable[[Params, Params, Batch], Array]
"""(trained parameters, frozen ones, rows [C, B, T]) -> fp32 [C, B, T], replicated."""


class Models(NamedTuple):
    """Functions from parameters to modules."""

    actor: Callable[[Params, Params], Baichuan2]
    """(trained, frozen)"""
    critic: Callable[[Params, Params], RewardModel]
    """(trained, frozen)"""
    reference: Callable[[Params], Baichuan2]
    reward: Callable[[Params], RewardModel]


class Held(NamedTuple):
    """Models that are not trained, in the compute dtype; the score of the reward model is fp32."""

    reference: Params
    reward: Params | None
    """None without a reward model."""


def critic_model(config: RLConfig) -> ModelConfig:
    """Architecture of the critic: that of the reward model, else the actor's."""
    path = config.ppo.reward_model
    return config.model if path is None else find_reward_model(path).config


def make_models(config: RLConfig, critic: ModelConfig) -> Models:
    """The modules of a run whose critic has the architecture `critic`."""
    actor_graph = split_model(config.model, config.compute)[0]
    critic_graph = split_reward_model(critic, config.compute)[0]
    lora = config.lora
    return Models(
        actor=lambda params, frozen: merge_model(actor_graph, lora, params[ACTOR], frozen.get(ACTOR, {})),
        critic=lambda params, frozen: merge_reward_model(critic_graph, lora, params[CRITIC], frozen.get(CRITIC, {})),
        reference=lambda params: nnx.merge(actor_graph, params),
        reward=lambda params: nnx.merge(critic_graph, params),
    )


# --------------------------------------------------------------------------------------------------------- parameters


def abstract_trained(config: RLConfig, critic: ModelConfig, mesh: Mesh) -> Params:
    """Shapes and shardings of the trained parameters."""
    lora = config.lora
    trained = {ACTOR: abstract_adapter(lora, config.model, mesh) if lora.rank else abstract_params(config.model, mesh)}
    if config.ppo.has_critic:
        whole = abstract_reward_params(critic, mesh)
        parts = {ADAPTER: abstract_adapter(lora, critic, mesh), SCORE: whole[SCORE]} if lora.rank else whole
        trained[CRITIC] = parts
    return trained


def abstract_held(config: RLConfig, critic: ModelConfig, mesh: Mesh) -> Held:
    """Shapes and shardings of the models that are not trained."""
    dtype = config.compute.dtype
    return Held(abstract_params(config.model, mesh, dtype), abstract_reward_params(critic, mesh, dtype))


def load_held(config: RLConfig, mesh: Mesh) -> Held:
    """Reads the models that are not trained. Raises as `load_params` and `load_reward_model`."""
    dtype, path = config.compute.dtype, config.ppo.reward_model
    reference = load_params(str(config.init_from), dtype, mesh)[0]
    return Held(reference, None if path is None else load_reward_model(path, dtype, mesh)[0])


def frozen_of(config: RLConfig, held: Held) -> Params:
    """The frozen parameters of the loss; they share the arrays of the held ones."""
    if not config.lora.rank:
        return {}
    frozen = {ACTOR: held.reference}
    if config.ppo.has_critic:
        frozen[CRITIC] = backbone_of(held.reference if held.reward is None else held.reward)
    return frozen


def init_trained(config: RLConfig, critic: ModelConfig, held: Held, mesh: Mesh) -> Params:
    """Initial trained parameters: the chat model as actor, the reward model as critic. Without a reward model the
    critic is the chat model with values of 0."""
    lora, frozen = config.lora, frozen_of(config, held)
    if lora.rank:
        trained = {ACTOR: init_adapter(lora, config.model, held.reference, config.seed, mesh)}
    else:
        trained = {ACTOR: load_params(str(config.init_from), "float32", mesh)[0]}
    if not config.ppo.has_critic:
        return trained
    path = config.ppo.reward_model
    if held.reward is None:
        score = jax.tree.map(jnp.zeros_like, init_score(critic, config.seed, mesh))
    else:  # a copy: the state is donated
        score = jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), held.reward[SCORE])
    if lora.rank:
        trained[CRITIC] = {ADAPTER: init_adapter(lora, critic, frozen[CRITIC], config.seed + 1, mesh), SCORE: score}
    elif path is not None:
        trained[CRITIC] = load_reward_model(path, "float32", mesh)[0]
    else:
        trained[CRITIC] = load_backbone(str(config.init_from), "float32", mesh)[0] | {SCORE: score}
    return trained


# ------------------------------------------------------------------------------------------------------ forward passes


def critic_values(module: RewardModel, batch: Batch) -> Array:
    """fp32 [B, T]: the value at every token."""
    return reshard(module.values(batch["input_ids"], batch["positions"], batch["segment_ids"]), "batch", "sequence")


class Programs(NamedTuple):
    """Compiled forward passes over the rows of an iteration, in the micro-batches of the updates."""

    log_probs: Forward
    values: Forward
    reference: Callable[[Params, Batch], Array]
    rewards: Callable[[Params, Batch], Array]


def make_programs(config: RLConfig, models: Models, options: dict | None = None) -> Programs:
    """The forward passes that turn rows of answers into experience; `options` are the compiler's."""
    chunk = config.compute.loss_chunk

    def over_rows(run: Callable[[Batch], Array], rows: Batch) -> Array:
        rows = {name: rows[name] for name in FIELDS}
        found = jax.lax.scan(lambda _, micro: (None, run(micro)), None, rows)[1]
        return reshard(found, None, None, None)

    def log_probs(params: Params, frozen: Params, rows: Batch) -> Array:
        module = models.actor(params, frozen)
        return over_rows(lambda micro: label_log_probs(module, micro, chunk), rows)

    def values(params: Params, frozen: Params, rows: Batch) -> Array:
        module = models.critic(params, frozen)
        return over_rows(lambda micro: critic_values(module, micro), rows)

    def reference(params: Params, rows: Batch) -> Array:
        module = models.reference(params)
        return over_rows(lambda micro: label_log_probs(module, micro, chunk), rows)

    def rewards(params: Params, rows: Batch) -> Array:
        module = models.reward(params)
        return over_rows(lambda micro: critic_values(module, micro), rows)

    return Programs(*(jax.jit(f, compiler_options=options) for f in (log_probs, values, reference, rewards)))
