"""Rewards of conversations: golden numbers; padding, order, batches and meshes change nothing."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align.scoring import Scorer, make_score
from bc2_jax.config import ComputeConfig
from bc2_jax.convert.hf_config import read_config
from bc2_jax.model.baichuan import param_shardings
from bc2_jax.model.reward import RewardModel, backbone_of
from tests.convert.models import GOLDEN, read_params

MODEL = read_config(GOLDEN / "rope-tiny")
REWARD = dict(np.load(GOLDEN / "align" / "reward.npz"))
PARAMS = backbone_of(read_params(GOLDEN / "rope-tiny", MODEL)) | {"score": {"weight": REWARD["score_weight"]}}
ROWS = [
    REWARD[f"{kind}/input_ids"][i, : 1 + REWARD[f"{kind}/last"][i]] for kind in ("chosen", "rejected") for i in range(5)
]
REWARDS = np.concatenate([REWARD[f"{kind}/rewards"] for kind in ("chosen", "rejected")])
FP32 = ComputeConfig(dtype="float32", attention="reference", scan_layers=False)


@functools.cache
def scorer() -> Scorer:
    return Scorer(PARAMS, MODEL, compute=FP32, rows=4)


def test_rewards_equal_pytorchs():
    rewards = scorer().score(ROWS)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, REWARDS, atol=2e-5)
    assert scorer().score([]).shape == (0,)


@settings(max_examples=10)
@given(st.data())
def test_order_and_company_change_nothing(data):
    numbers = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
    long = data.draw(st.booleans())  # in a batch of its own
    rewards = scorer().score([ROWS[i] for i in numbers] + [np.full(70, 5)] * long)
    np.testing.assert_allclose(rewards[: len(numbers)], REWARDS[numbers], atol=2e-5)


score_rows = jax.jit(make_score(MODEL, FP32))


@settings(max_examples=15)
@given(st.data())
def test_padding_on_either_side_and_rubbish_in_it_change_nothing(data):
    tokens = np.zeros((3, 48), np.int32)
    segments = np.zeros_like(tokens)
    numbers = data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))
    tokens[:] = data.draw(st.sampled_from([0, 2, MODEL.vocab_size - 1, -7, 10**6]))
    for row, number in enumerate(numbers):
        start = data.draw(st.integers(0, 48 - len(ROWS[number])))
        here = slice(start, start + len(ROWS[number]))
        tokens[row, here], segments[row, here] = ROWS[number], 1
    rewards = score_rows(PARAMS, {"input_ids": tokens, "segment_ids": segments})
    np.testing.assert_allclose(rewards, REWARDS[numbers], atol=2e-5)


def test_a_mesh_changes_nothing(mesh_of):
    mesh = mesh_of(1, 2, 2, context=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, param_shardings(MODEL, mesh, RewardModel))
    on_mesh = Scorer(params, MODEL, compute=FP32, rows=3)
    np.testing.assert_allclose(on_mesh.score(ROWS[:4]), REWARDS[:4], atol=2e-5)


def test_what_cannot_be_scored_is_named():
    for ids, told in (
        ([], "at least one"),
        ([1.5], "token ids"),
        ([0, MODEL.vocab_size], "an id that is not in"),
        ([-1], "an id that is not in"),
        ([5] * (MODEL.model_max_length + 1), "model_max_length"),
    ):
        with pytest.raises(ValueError, match=rf"conversations\[1\].*{told}"):
            scorer().score([ROWS[0], ids])
    with pytest.raises(ValueError, match="no tokenizer"):
        scorer().score_messages([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
