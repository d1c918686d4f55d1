"""What is compiled ahead of time of a rollout is what a run has."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from bc2_jax.align.actor_critic import abstract_held, abstract_trained, critic_model, frozen_of, make_models
from bc2_jax.align.rl import make_rollout
from bc2_jax.config import LoraConfig, MeshConfig, ModelConfig, PPOConfig, RLConfig
from bc2_jax.infer import engine

CONFIG = RLConfig(
    name="tiny",
    model=ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, position_embedding="rope",
        vocab_size=64, model_max_length=256,
    ),
    ppo=PPOConfig(prompts_per_step=16, rollout_rows=16, max_prompt_tokens=70, max_new_tokens=50, minibatches=2),
    mesh=MeshConfig(fsdp=2, tensor=2),
    num_steps=30,
)  # fmt: skip
LORA = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2))


def of(config: RLConfig, **changes) -> RLConfig:
    return dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, **changes))


@pytest.mark.parametrize("config", [CONFIG, of(LORA, rollout_gathers_once=True)], ids=["full", "lora"])
def test_the_actor_is_laid_out_as_the_engine_has_it(mesh_of, config):
    mesh = mesh_of(1, 2, 2)
    with jax.set_mesh(mesh):
        critic = critic_model(config)
        shapes = abstract_trained(config, critic, mesh), frozen_of(config, abstract_held(config, critic, mesh))
        zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
        actor = make_models(config, critic).actor(*zeros)
        real = engine.prepare(actor, whole=config.ppo.rollout_gathers_once).params
        parts = make_rollout(config, mesh)
    assert jax.tree.structure(real) == jax.tree.structure(parts.prepared.params)
    for mine, its in zip(jax.tree.leaves(parts.prepared.params), jax.tree.leaves(real), strict=True):
        assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
        assert mine.sharding.is_equivalent_to(its.sharding, its.ndim)
    assert dataclasses.astuple(parts.shapes) == (16, 4, 128)
    assert (parts.answers, parts.settings.max_new_tokens, parts.settings.temperature) == (16, 50, 1)


@pytest.mark.parametrize(
    ("config", "held"),
    [
        (CONFIG, {"reference", "reward model"}),
        (of(CONFIG, reward_functions=("f.py:f",)), {"reference"}),
        (of(CONFIG, algorithm="grpo", answers_per_prompt=2), {"reference", "reward model"}),
        (LORA, set()),
        (of(LORA, algorithm="grpo", answers_per_prompt=2), {"reward model"}),
    ],
)
def test_what_is_held_is_counted_once(mesh_of, config, held):
    """With adapters reference and reward model are frozen parameters of the step."""
    mesh = mesh_of(1, 2, 2)
    with jax.set_mesh(mesh):
        assert set(make_rollout(config, mesh).held) == held
