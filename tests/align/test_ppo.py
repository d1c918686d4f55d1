"""PPO's functions against golden numbers, finite differences, the closed form, and whatever padding holds."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align import ppo

GOLDEN = Path(__file__).parents[1] / "golden" / "align"
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "ppo.npz") as file:
        return dict(file)


def policy_loss(new, old, advantages, mask, clip):
    return ppo.token_mean(ppo.policy_token_loss(new, old, advantages, mask, clip).loss, mask)


def value_loss(new, old, returns, mask, clip):
    return ppo.token_mean(ppo.value_token_loss(new, old, returns, mask, clip).loss, mask)


def real(golden, name: str) -> np.ndarray:
    """A golden value where the tokens are real."""
    return np.where(golden["mask"], golden[name], 0)


def test_the_penalty_for_leaving_the_reference(golden):
    kl = ppo.kl_estimates(golden["old_logps"], golden["ref_logps"], golden["mask"])
    bare = ppo.kl_estimates(golden["old_logps"], golden["ref_logps"])
    for name in ("k1", "k2", "k3"):
        np.testing.assert_allclose(getattr(kl, name), real(golden, f"kl/{name}"), **CLOSE)
        np.testing.assert_allclose(np.where(golden["mask"], getattr(bare, name), 0), getattr(kl, name), **CLOSE)
        np.testing.assert_allclose(
            ppo.token_mean(getattr(bare, name), golden["mask"]), golden[f"kl_mean/{name}"], **CLOSE
        )
        rewards = ppo.shape_rewards(golden["scores"], getattr(bare, name), golden["mask"], float(golden["kl_coef"]))
        np.testing.assert_allclose(rewards, real(golden, f"rewards/{name}"), **CLOSE)
    low = ppo.shape_rewards(golden["scores"], kl.k1, golden["mask"], 0.005)
    np.testing.assert_allclose(low, real(golden, "rewards_low_kl"), **CLOSE)


K3 = jax.jit(jax.value_and_grad(lambda r: ppo.kl_estimates(r, 0.0).k3))


@settings(max_examples=25, deadline=None)
@given(st.floats(-20, 20))
def test_k3_is_never_negative_and_keeps_its_digits(r):
    exact = np.expm1(-np.float64(np.float32(r))) + np.float64(np.float32(r))
    found, slope = K3(np.float32(r))
    assert found >= 0
    np.testing.assert_allclose(found, exact, rtol=2e-5)
    np.testing.assert_allclose(slope, -np.expm1(-np.float64(np.float32(r))), rtol=2e-5, atol=1e-12)


def test_advantages_returns_and_whitening(golden):
    found, returns = ppo.advantages(golden["rewards/k1"], golden["values"], golden["mask"], 1.0, 0.95)
    np.testing.assert_allclose(found, real(golden, "advantages"), **CLOSE)
    np.testing.assert_allclose(returns, real(golden, "returns"), **CLOSE)
    np.testing.assert_allclose(
        ppo.whiten(found, golden["mask"]), real(golden, "advantages_whitened"), rtol=2e-6, atol=2e-6
    )


def test_the_losses_and_their_gradients(golden):
    new, old, mask = golden["new_logps"], golden["old_logps"], golden["mask"]
    whitened, clip = golden["advantages_whitened"], float(golden["clip"])
    loss, gradient = jax.value_and_grad(policy_loss)(new, old, whitened, mask, clip)
    np.testing.assert_allclose(loss, golden["policy_loss"], **CLOSE)
    np.testing.assert_allclose(gradient, golden["policy_grad"], **CLOSE)
    share = ppo.token_mean(ppo.policy_token_loss(new, old, whitened, mask, clip).clipped, mask)
    np.testing.assert_allclose(share, golden["clip_fraction"], **CLOSE)
    tokens = ppo.policy_token_loss(new, old, whitened, mask, clip)
    np.testing.assert_allclose(tokens.ratio, real(golden, "ratio"), **CLOSE)
    np.testing.assert_allclose(tokens.loss, golden["policy_token_loss"], **CLOSE)
    values = golden["new_values"], golden["values"], golden["returns"], mask
    loss, gradient = jax.value_and_grad(value_loss)(*values, float(golden["value_clip"]))
    np.testing.assert_allclose(loss, golden["value_loss"], **CLOSE)
    np.testing.assert_allclose(gradient, golden["value_grad"], **CLOSE)
    np.testing.assert_allclose(value_loss(*values, None), golden["value_loss_unclipped"], **CLOSE)
    clipped = ppo.value_token_loss(*values, float(golden["value_clip"])).clipped
    np.testing.assert_allclose(ppo.token_mean(clipped, mask), golden["value_clip_fraction"], **CLOSE)


def random_batch(seed: int, B: int, S: int):
    rng = np.random.default_rng(seed)
    mask = np.arange(S) < rng.integers(0, S + 1, B)[:, None]
    if seed % 2:
        mask = rng.random((B, S)) < 0.6  # holes, and padding on the left
    return rng, mask, *(rng.normal(0, 0.3, (B, S)).astype(np.float32) for _ in range(4))


@jax.jit
def everything(scores, mask, new, old, reference, values):
    """All of an update, and the gradients of both losses."""
    kl = ppo.kl_estimates(old, reference)
    rewards = ppo.shape_rewards(scores, kl.k3, mask, 0.2)
    found, returns = ppo.advantages(rewards, values, mask, 0.99, 0.9)
    whitened = ppo.whiten(found, mask)
    policy = jax.value_and_grad(policy_loss)(new, old, whitened, mask, 0.1)
    value = jax.value_and_grad(value_loss)(values + 0.3, values, returns, mask, 0.2)
    k3 = jax.grad(lambda x: ppo.token_mean(ppo.kl_estimates(x, reference, mask).k3, mask))(new)
    spread = ppo.explained_variance(values, returns, mask)
    return rewards, found, returns, whitened, policy, value, k3, spread


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_padding_holds_what_it_likes(seed):
    rng, mask, *arrays = random_batch(seed, 4, 5)
    scores = rng.normal(size=4).astype(np.float32)
    expected = everything(scores, mask, *arrays)
    for rubbish in (np.nan, np.inf, -np.inf, 150.0, -150.0):
        spoilt = (np.where(mask, x, np.float32(rubbish if i % 2 else -rubbish)) for i, x in enumerate(arrays))
        found = everything(scores, mask, *spoilt)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(expected))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_advantages_are_those_of_the_definition(seed):
    rng, mask, rewards, values, *_ = random_batch(seed, 3, 7)
    after = rng.normal(size=3).astype(np.float32)
    found, returns = jax.jit(ppo.advantages)(rewards, values, mask, 0.9, 0.7, after)
    for b in range(3):
        places = np.flatnonzero(mask[b])
        later = [*values[b, places[1:]], after[b]]
        deltas = rewards[b, places] + 0.9 * np.array(later) - values[b, places] if len(places) else []
        for i, place in enumerate(places):
            expected = sum((0.9 * 0.7) ** k * delta for k, delta in enumerate(deltas[i:]))
            np.testing.assert_allclose(found[b, place], expected, atol=2e-6)
            np.testing.assert_allclose(returns[b, place], expected + values[b, place], atol=2e-6)


def test_gradients_are_those_of_finite_differences(golden):
    mask, whitened = golden["mask"], golden["advantages_whitened"]
    with jax.enable_x64(True):
        # The functions compute in fp32: a large step, and tokens away from the edge of the clip.
        for function, args in (
            (policy_loss, (golden["new_logps"], golden["old_logps"], whitened, mask, 0.1)),
            (value_loss, (golden["new_values"], golden["values"], golden["returns"], mask, 0.2)),
        ):
            gradient = jax.grad(function)(*args)
            for place in np.argwhere(mask)[::7]:
                step = np.zeros(mask.shape, np.float32)
                step[tuple(place)] = 2e-3
                up, down = (float(function(args[0] + sign * step, *args[1:])) for sign in (1, -1))
                np.testing.assert_allclose((up - down) / 4e-3, gradient[tuple(place)], atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float16])
def test_other_dtypes_are_not_kept(dtype):
    mask = np.ones((2, 3))
    rewards = ppo.shape_rewards(jnp.array([2, -1], dtype), np.full((2, 3), 0.7, np.float32), mask, 0.5)
    np.testing.assert_allclose(rewards, [[-0.35, -0.35, 1.65], [-0.35, -0.35, -1.35]], rtol=1e-6)
    found, _ = ppo.advantages(jnp.ones((2, 3), dtype), np.full((2, 3), 0.25, np.float32), mask, 1.0, 0.5)
    assert found.dtype == jnp.float32 and float(found[0, 2]) == 0.75
    fractional = ppo.shape_rewards(jnp.array([0.7, -1.6]), jnp.zeros((2, 3), dtype), mask, 0.2)
    np.testing.assert_allclose(fractional[:, 2], [0.7, -1.6], rtol=1e-6)


def test_a_single_token_and_none():
    one, none = np.zeros((2, 3)), np.zeros((2, 3))
    one[1, 1] = 1
    x = np.full((2, 3), 5.0, np.float32)
    for mask in (one, none):
        np.testing.assert_array_equal(ppo.whiten(x, mask), 0)
        assert float(jnp.abs(jax.grad(lambda x, m=mask: ppo.whiten(x, m)[1, 1])(x)).max()) < np.inf
    assert float(policy_loss(x, x, x, none, 0.1)) == float(value_loss(x, x, x, none, 0.2)) == 0
    assert float(policy_loss(x, x, x, one, 0.1)) == -5


def test_the_coefficient_of_the_penalty(golden):
    for shape in ("linear", "geometric"):
        found = [ppo.scheduled_coefficient(shape, 0.2, 0.005, int(step), 350) for step in golden["schedule/step"]]
        np.testing.assert_allclose(found, golden[f"schedule/{shape}"], rtol=1e-6)
    assert ppo.scheduled_coefficient("geometric", 0.2, 0.005, 400, 350) == pytest.approx(0.005)
    assert ppo.scheduled_coefficient("constant", 0.2, 0.005, 400, 350) == 0.2
    coefficient, found = 0.2, [0.2]
    for kl in golden["adaptive/kl"]:
        coefficient = ppo.adapted_coefficient(coefficient, float(kl), 6.0, 64, 10_000)
        found.append(coefficient)
    np.testing.assert_allclose(found, golden["adaptive/coef"], rtol=1e-6)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_exact_expectations_reach_the_closed_form(case):
    """Finite answers: the optimum of E r - beta KL is pi* = reference * exp(r / beta) / Z. Each answer is one token,
    weighed with its probability; the critic is the exact expectation."""
    known = json.loads((GOLDEN / "closed_form.json").read_text())
    optimum, r = known["optimum"][case], np.array(known["rewards"], np.float32)
    beta = optimum["beta"]
    reference = jax.nn.log_softmax(np.array(known["ref_logits"], np.float32))
    mask = np.ones((len(r), 1))

    @jax.jit
    def improve(logits):
        old = jax.nn.log_softmax(logits)
        kl = ppo.kl_estimates(old[:, None], reference[:, None]).k1
        rewards = ppo.shape_rewards(r, kl, mask, beta)
        value = jnp.sum(jnp.exp(old)[:, None] * rewards)
        found, _ = ppo.advantages(rewards, jnp.full_like(rewards, value), mask, 1.0, 0.95)

        def loss(logits):  # an expectation over the old policy, of the loss of each answer
            new = jax.nn.log_softmax(logits)[:, None]
            return jnp.sum(jnp.exp(old)[:, None] * ppo.policy_token_loss(new, old[:, None], found, mask, 0.1).loss)

        # The natural gradient: that of a softmax policy has the inverse of diag(p) - p p^T in it.
        return logits - 0.5 / beta * jax.grad(loss)(logits) / jnp.exp(old)

    logits = reference
    for _ in range(60):
        logits = improve(logits)
    found = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(found, optimum["log_pi"], atol=2e-3)
    p = np.exp(np.float64(found))
    np.testing.assert_allclose(p @ (np.float64(found) - reference), optimum["kl"], atol=1e-3)
    np.testing.assert_allclose(p @ r, optimum["expected_reward"], atol=1e-3)
    np.testing.assert_allclose(p @ r - beta * (p @ (np.float64(found) - reference)), optimum["objective"], atol=1e-5)
