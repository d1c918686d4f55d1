"""Values of a reward model: parity with PyTorch, padding on either side, meshes, first weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from bc2_jax.config import ComputeConfig
from bc2_jax.convert.hf_config import read_config
from bc2_jax.model.baichuan import param_shardings
from bc2_jax.model.reward import (
    RewardModel,
    abstract_reward_params,
    backbone_of,
    init_score,
    reward_params_from,
    split_reward_model,
)
from bc2_jax.sharding import DEFAULT_RULES
from tests.convert.models import GOLDEN, read_params

MODEL = read_config(GOLDEN / "rope-tiny")
REWARD = dict(np.load(GOLDEN / "align" / "reward.npz"))
ROWS = np.concatenate([REWARD[f"{kind}/input_ids"] for kind in ("chosen", "rejected")]).astype(np.int32)
SEGMENTS = np.concatenate([REWARD[f"{kind}/attention_mask"] for kind in ("chosen", "rejected")]).astype(np.int32)
VALUES = np.concatenate([REWARD[f"{kind}/values"] for kind in ("chosen", "rejected")])


@functools.cache
def golden_params() -> dict:
    params = read_params(GOLDEN / "rope-tiny", MODEL)
    return backbone_of(params) | {"score": {"weight": REWARD["score_weight"]}}


@functools.cache
def forward():
    graphdef, _, _ = split_reward_model(MODEL, ComputeConfig(dtype="float32", attention="reference"))
    return jax.jit(lambda params, *inputs: nnx.merge(graphdef, params).values(*inputs))


def test_values_and_rewards_equal_pytorchs():
    values = np.asarray(forward()(golden_params(), ROWS, None, SEGMENTS))
    assert values.dtype == np.float32
    np.testing.assert_allclose(np.where(SEGMENTS, values, 0), VALUES, atol=2e-5)
    last = np.concatenate([REWARD[f"{kind}/last"] for kind in ("chosen", "rejected")])
    expected = np.concatenate([REWARD[f"{kind}/rewards"] for kind in ("chosen", "rejected")])
    np.testing.assert_allclose(values[np.arange(len(values)), last], expected, atol=2e-5)


def test_left_padding_packing_and_a_mesh_change_nothing(mesh_of):
    lengths = SEGMENTS.sum(1)
    left = np.stack([np.roll(row, len(row) - n) for row, n in zip(ROWS, lengths, strict=True)])
    mask = np.stack([np.roll(row, len(row) - n) for row, n in zip(SEGMENTS, lengths, strict=True)])
    rubbish = np.where(mask, left, np.random.default_rng(0).integers(MODEL.vocab_size, size=left.shape))
    expected = np.stack([np.roll(row, len(row) - n) for row, n in zip(VALUES, lengths, strict=True)])
    values = forward()(golden_params(), rubbish.astype(np.int32), None, mask)
    np.testing.assert_allclose(np.where(mask, values, 0), expected, atol=2e-5)
    mesh = mesh_of(1, 2, 2, context=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(golden_params(), param_shardings(MODEL, mesh, RewardModel))
        rows = jax.device_put((left, mask), NamedSharding(mesh, DEFAULT_RULES.spec("batch", "sequence")))
        values = forward()(params, rows[0], None, rows[1])
        total = lambda params: jnp.sum(forward()(params, rows[0], None, rows[1]) * rows[1])  # noqa: E731
        gradient = jax.jit(jax.grad(total))(params)
    np.testing.assert_allclose(np.where(mask, values, 0), expected, atol=2e-5)
    assert jax.tree.map(lambda x: x.sharding.spec, gradient) == jax.tree.map(lambda x: x.sharding.spec, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_abstract_parameters_have_an_fp32_score(mesh_of, dtype: str):
    mesh = mesh_of(2, 2, 2)
    abstract = abstract_reward_params(MODEL, mesh, dtype)
    assert abstract.keys() == {"embed_tokens", "layers", "norm", "score"}
    assert abstract["score"]["weight"].dtype == jnp.float32
    assert abstract["norm"]["weight"].dtype == jnp.dtype(dtype)
    split = split_reward_model(MODEL)[1]
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, split)


def test_first_weights_are_those_of_any_mesh_and_an_own_score_stays(mesh_of):
    base = read_params(GOLDEN / "rope-tiny", MODEL)
    params = reward_params_from(base, MODEL, 3, None)
    assert params.keys() == {"embed_tokens", "layers", "norm", "score"} and params["layers"] is base["layers"]
    score = params["score"]["weight"]
    np.testing.assert_array_equal(score, init_score(MODEL, 3, mesh_of(2, 2, 2))["weight"])
    assert not np.array_equal(score, init_score(MODEL, 4, None)["weight"])
    assert float(jnp.std(score)) == pytest.approx((MODEL.hidden_size + 1) ** -0.5, rel=0.35)
    assert reward_params_from(params, MODEL, 5, None) is params
