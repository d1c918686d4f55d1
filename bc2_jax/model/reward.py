"""Reward model or critic: Baichuan 2 with a scalar output per token instead of a language head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from bc2_jax.config import ComputeConfig, DType, ModelConfig
from bc2_jax.model.baichuan import DEFAULT_COMPUTE, Backbone, Params, abstract_params, split_model
from bc2_jax.model.layers import Weight
from bc2_jax.sharding import spec, use_mesh_of

HEAD, SCORE = "lm_head", "score"
"""The head of a language model and of a reward model."""
_AXES = (None,)


class RewardModel(Backbone):
    """The backbone and `score`, a weight [D] without bias.

    The reward of a conversation is the value at its last token, the eos, as in LlamaForSequenceClassification with one
    label.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig = DEFAULT_COMPUTE, *, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs=rngs)
        self.score = Weight.normal(rngs, (config.hidden_size,), _AXES, score_stddev(config))

    def values(self, input_ids: Array, positions: Array | None = None, segment_ids: Array | None = None) -> Array:
        """fp32 [B, T]: the value at every token of [B, T] ids; arguments as for `Baichuan2.__call__`.

        Hidden states are in the compute dtype; their products with the weight and the sum are fp32.
        """
        with use_mesh_of(self.norm.weight[...]):
            h_BTD = self.hidden_states(input_ids, positions, segment_ids)
            # Not a matmul, which would round its operands on a TPU.
            return jnp.sum(h_BTD.astype(jnp.float32) * self.score.weight[...].astype(jnp.float32), axis=-1)


def score_stddev(config: ModelConfig) -> float:
    """Standard deviation of the initial weights, N(0, 1 / (D + 1)) (arXiv 2009.01325): initial rewards have a spread of
    about 1."""
    return (config.hidden_size + 1) ** -0.5


def split_reward_model(config: ModelConfig, compute: ComputeConfig = DEFAULT_COMPUTE) -> tuple[Any, Params, Params]:
    """`split_model` of a reward model; parameters {"embed_tokens", "layers", "norm", "score": {"weight"}}."""
    return split_model(config, compute, RewardModel)


def abstract_reward_params(config: ModelConfig, mesh: Mesh | None, dtype: DType = "float32") -> Params:
    """`abstract_params` of a reward model; `score` is fp32 whatever `dtype`."""
    params = abstract_params(config, mesh, dtype, RewardModel)
    score = params[SCORE]["weight"]
    return params | {SCORE: {"weight": jax.ShapeDtypeStruct(score.shape, jnp.float32, sharding=score.sharding)}}


def init_score(config: ModelConfig, seed: int, mesh: Mesh | None) -> Params:
    """{"weight": fp32 [D]}, random, replicated on `mesh` or on the first device; independent of the mesh."""

    def draw(seed: Array | int) -> Array:
        return score_stddev(config) * jax.random.normal(jax.random.key(seed), (config.hidden_size,))

    sharding = None if mesh is None else NamedSharding(mesh, spec(*_AXES))
    return {"weight": jax.jit(draw, out_shardings=sharding)(seed)}


def backbone_of(params: Params) -> Params:
    """A model's parameters without those of its head."""
    return {name: part for name, part in params.items() if name not in (HEAD, SCORE)}


def reward_params_from(params: Params, config: ModelConfig, seed: int, mesh: Mesh | None) -> Params:
    """Initial parameters for training a reward model.

    Those of a reward model unchanged; of a language model, the backbone with a new `score`.
    """
    return params if SCORE in params else backbone_of(params) | {SCORE: init_score(config, seed, mesh)}
