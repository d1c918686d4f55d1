"""What `tools/aot_compile.py` compiles of reinforcement learning beside its updates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from bc2_jax.align.actor_critic import abstract_held, abstract_trained, critic_model, frozen_of, make_models
from bc2_jax.aot.inference import inference_compute
from bc2_jax.aot.rollout import RolloutParts
from bc2_jax.config import RLConfig
from bc2_jax.infer import engine
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.settings import Settings
from bc2_jax.sharding import place_shapes, use_rules


def make_rollout(config: RLConfig, mesh: Mesh) -> RolloutParts:
    """The rollout of an iteration, and the models that are held beside the state and the frozen parameters.

    A run without reward functions is taken to have a reward model, of the actor's architecture if `ppo.reward_model`
    does not name one. With adapters, reference and reward model are the frozen parameters themselves.
    """
    rl, lora, critic = config.ppo, config.lora.rank > 0, critic_model(config)
    compute = inference_compute(config.compute)
    models = make_models(dataclasses.replace(config, compute=compute), critic)
    read = abstract_held(config, critic, mesh)
    trained, frozen = abstract_trained(config, critic, mesh), frozen_of(config, read)
    with jax.set_mesh(mesh), use_rules(engine.decoding_rules()):
        prepared = jax.eval_shape(
            lambda *params: engine.prepare(models.actor(*params), whole=rl.rollout_gathers_once), trained, frozen
        )
        shapes = RolloutShapes.of(rl.rollout_rows, None, rl.max_prompt_tokens + rl.max_new_tokens)
    held: dict[str, Any] = {} if lora else {"reference": read.reference}
    has_reward_model = rl.reward_model is not None or not rl.reward_functions
    if has_reward_model and not (lora and rl.has_critic):
        held["reward model"] = read.reward
    return RolloutParts(
        prepared=place_shapes(mesh, prepared),
        shapes=shapes,
        prompt_tokens=rl.max_prompt_tokens,
        settings=Settings(rl.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0),
        answers=rl.answers,
        held=held,
    )
