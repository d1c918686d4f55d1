"""Sequences longer than those a model was trained on, against whole forward passes with other slopes and bases."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bc2_jax.config import ComputeConfig
from bc2_jax.infer.engine import prepare
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.prepared import Prepared
from bc2_jax.infer.refill import continue_many
from bc2_jax.infer.settings import Settings
from bc2_jax.model.baichuan import Baichuan2, split_model
from bc2_jax.model.position import alibi_slopes

COMPUTE = ComputeConfig(dtype="float32", attention="reference")
GREEDY = Settings(max_new_tokens=8, temperature=0.0, repetition_penalty=1.0, eos_token_id=())


@pytest.fixture(scope="module")
def prepared(golden) -> Prepared:
    graphdef = split_model(golden.config, COMPUTE)[0]
    return prepare(nnx.merge(graphdef, golden.params))


def make_prompts(config) -> list[list[int]]:
    """One within the trained length, one at twice that length with its new tokens."""
    rng = np.random.default_rng(0)
    lengths = (20, 2 * config.model_max_length - GREEDY.max_new_tokens)
    return [rng.integers(3, config.vocab_size, length).tolist() for length in lengths]


def test_what_is_chosen_is_that_of_a_whole_forward_pass(golden, prepared, monkeypatch):
    config, prompts = golden.config, make_prompts(golden.config)
    short, long = continue_prompts(prepared.reach("ntk", 2 * config.model_max_length), prompts, GREEDY, log_probs=True)
    plain = continue_prompts(prepared, prompts[:1], GREEDY, log_probs=True)[0]
    assert short.tokens == plain.tokens  # a short sequence is not stretched
    np.testing.assert_allclose(short.log_probs, plain.log_probs, atol=2e-6)
    if config.position_embedding == "rope":
        theta = config.rope_theta * 2 ** (config.head_dim / (config.head_dim - 2))
        stretched = dataclasses.replace(config, rope_theta=theta)
    else:
        slopes = alibi_slopes(config.num_attention_heads)
        steepest_first = np.argsort(np.argsort(-slopes))
        slopes = (slopes / 2 ** (steepest_first / (len(slopes) - 1))).astype(np.float32)
        monkeypatch.setattr("bc2_jax.model.attention.alibi_slopes", lambda heads: slopes)
        stretched = config
    model: Baichuan2 = nnx.merge(split_model(stretched, COMPUTE)[0], jax.tree.map(jnp.asarray, golden.params))
    logits = model(jnp.asarray([prompts[1] + long.tokens[:-1]]))[0, len(prompts[1]) - 1 :]
    np.testing.assert_array_equal(logits.argmax(-1), long.tokens)
    log_probs = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(long.tokens)), long.tokens]
    np.testing.assert_allclose(log_probs, long.log_probs, atol=2e-5)


def test_rollouts_stretch_each_row_by_its_own_length(golden, prepared):
    long = prepared.reach("ntk", 2 * golden.config.model_max_length)
    prompts = make_prompts(golden.config)
    alone = [continue_prompts(long, [prompt], GREEDY)[0].tokens for prompt in prompts]
    found, _ = continue_many(long, prompts, GREEDY, rows=2)
    assert [c.tokens for c in found] == alone


def test_what_cannot_be_is_refused(golden, prepared):
    length = golden.config.model_max_length
    with pytest.raises(ValueError, match=f"prompts.1. has .* is more than model_max_length = {length}"):
        continue_prompts(prepared, make_prompts(golden.config), GREEDY)
    with pytest.raises(ValueError, match=f"is more than max_length = {length + 1}"):
        continue_prompts(prepared.reach("ntk", length + 1), make_prompts(golden.config), GREEDY)
    with pytest.raises(ValueError, match="max_length = .* greater than model_max_length"):
        prepared.reach("ntk", length)
    with pytest.raises(ValueError, match="long_context = 'linear' is not valid"):
        prepared.reach("linear", 2 * length)  # type: ignore[arg-type]  # what is tested
    if golden.config.position_embedding == "alibi":
        with pytest.raises(ValueError, match="the model has ALiBi"):
            prepared.reach("yarn", 2 * length)
