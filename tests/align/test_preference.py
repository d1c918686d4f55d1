"""Losses of preferences against PyTorch's numbers, against differences of numpy's, and at the known optimum."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align.preference import LOSSES, PER_TOKEN, SMOOTHED, dpo_loss, ranked_loss, reward_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "align"
DPO = dict(np.load(GOLDEN / "dpo.npz"))
REWARD = dict(np.load(GOLDEN / "reward.npz"))
SUMS = [DPO[f"{answer}/{model}_logps"] for model in ("policy", "reference") for answer in ("chosen", "rejected")]
LENGTHS = {f"{answer}_lengths": DPO[f"{answer}/completion_mask"].sum(-1) for answer in ("chosen", "rejected")}


def smoothing_of(loss: str) -> float:
    return 0.1 if loss in SMOOTHED else 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_pairs_are_pytorchs(loss):
    ours = dpo_loss(*SUMS, loss=loss, beta=0.1, label_smoothing=smoothing_of(loss), **LENGTHS)
    expected = DPO[f"loss_per_pair/{'ipo_sum' if loss == 'ipo' else loss}"]
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-5)


def test_at_the_reference_nothing_is_known():
    same = SUMS[2], SUMS[3], SUMS[2], SUMS[3]
    np.testing.assert_allclose(dpo_loss(*same, loss="sigmoid", beta=0.3), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(*same, loss="ipo", beta=0.1), DPO["loss_at_reference/ipo_sum"], rtol=1e-6)


def expected_loss(d: float, a: float, loss: str, beta: float, e: float) -> float:
    """In fp64, as it is written down."""
    x = beta * (a if loss in PER_TOKEN else d)
    right, wrong = np.logaddexp(0, -x), np.logaddexp(0, x)
    return {
        "sigmoid": right, "sigmoid_norm": right, "hinge": max(0.0, 1 - x),
        "cdpo": (1 - e) * right + e * wrong, "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
        "ipo": (x / beta - 0.5 / beta) ** 2, "ipo_mean": (x / beta - 0.5 / beta) ** 2,
    }[loss]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOSSES), st.floats(0.01, 2), st.floats(-3e4, 3e4, width=32), st.integers(1, 900),
    st.integers(1, 900),
)  # fmt: skip
def test_values_and_gradients_are_right_however_far_the_policy_has_gone(loss, beta, far, n_chosen, n_rejected):
    beta, e = np.float32(beta).item(), smoothing_of(loss)
    sums = np.array([-40.0 + far, -30.0, -35.0, -50.0], np.float32)

    def ours(x):
        return dpo_loss(
            x[0], x[1], x[2], x[3], loss=loss, beta=beta, label_smoothing=e, chosen_lengths=n_chosen,
            rejected_lengths=n_rejected,
        )  # fmt: skip

    def expected(x):
        chosen, rejected = x[0] - x[2], x[1] - x[3]
        return expected_loss(chosen - rejected, chosen / n_chosen - rejected / n_rejected, loss, beta, e)

    value, gradient = jax.value_and_grad(ours)(sums)
    exact = sums.astype(np.float64)
    assert value == pytest.approx(expected(exact), rel=1e-4, abs=1e-4)
    steps = np.eye(4) * 1e-3
    slopes = np.array([(expected(exact + step) - expected(exact - step)) / 2e-3 for step in steps])
    assert np.isfinite(gradient).all()
    if loss != "hinge" or abs(value - 0) > 1e-2:  # not across its corner
        np.testing.assert_allclose(gradient, slopes, rtol=2e-3, atol=2e-4 * max(1, 1 / beta))


def test_rewards_are_compared_as_pytorch_does():
    chosen, rejected = REWARD["chosen/rewards"], REWARD["rejected/rewards"]
    found = {
        "pairwise": reward_loss(chosen, rejected),
        "pairwise_margin": reward_loss(chosen, rejected, REWARD["margin"]),
        "pairwise_centred": reward_loss(chosen, rejected, centring=float(REWARD["centring"])),
    }
    for name, losses in found.items():
        assert losses.shape == chosen.shape
        assert float(losses.mean()) == pytest.approx(float(REWARD[f"loss/{name}"]), abs=1e-5)
    np.testing.assert_allclose(ranked_loss(REWARD["ranked_rewards"]).mean(), REWARD["ranked_loss"], atol=1e-6)
    pairs = ranked_loss(np.stack([chosen, rejected], 1))
    np.testing.assert_allclose(pairs, reward_loss(chosen, rejected), rtol=1e-6)
    far = jax.grad(lambda x: reward_loss(x, -x, 0.5).sum())(jnp.array([3e4, -3e4]))
    np.testing.assert_array_equal(far, [0, -2])


@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0])
def test_the_optimum_is_the_known_one(beta):
    """Over finite answers, with the labels of infinitely many raters, DPO is least at ref exp(r / beta) / Z."""
    known = json.loads((GOLDEN / "closed_form.json").read_text())
    optimum = next(case for case in known["optimum"] if case["beta"] == beta)
    with jax.enable_x64(True):
        reference = jax.nn.log_softmax(jnp.array(known["ref_logits"]))
        labels, count = jnp.array(known["bradley_terry"]), len(known["rewards"])
        i, j = (x.ravel() for x in np.indices((count, count)))

        def loss(logits):
            policy = jax.nn.log_softmax(logits)
            losses = dpo_loss(policy[i], policy[j], reference[i], reference[j], loss="sigmoid", beta=beta)
            return jnp.sum(labels.ravel() * losses)

        step = jax.jit(lambda x: x - jnp.linalg.pinv(jax.hessian(loss)(x), rtol=1e-9) @ jax.grad(loss)(x))
        logits = reference
        for _ in range(30):  # Newton's: it is convex
            logits = step(logits)
        policy = jax.nn.log_softmax(logits)
        np.testing.assert_allclose(policy, optimum["log_pi"], atol=1e-6)
        assert float(jnp.sum(jnp.exp(policy) * (policy - reference))) == pytest.approx(optimum["kl"], abs=1e-8)
        reward = float(jnp.exp(policy) @ jnp.array(known["rewards"]))
        assert reward == pytest.approx(optimum["expected_reward"], abs=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "dpo"}, "loss = 'dpo' is not valid: it must be one of sigmoid, cdpo"),
        ({"beta": 0.0}, "beta = 0.0 is not valid: it must be positive"),
        ({"loss": "robust", "label_smoothing": 0.5}, r"label_smoothing = 0.5 is not valid: it must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1}, "label_smoothing = 0.1 is not valid: it must be 0 for sigmoid; cdpo and robust"),
        ({"loss": "ipo_mean", "chosen_lengths": None}, "chosen_lengths = None is not valid: ipo_mean averages"),
        (
            {"loss": "ipo_mean", "rejected_lengths": np.ones(4)},
            r"rejected_lengths has shape \(4,\); it must be that of",
        ),
    ],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*SUMS, **({"loss": "sigmoid", "beta": 0.1} | LENGTHS | changes))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"reference_chosen has shape \(5, 1\); it must be that of policy_chosen, \(5"):
        dpo_loss(SUMS[0], SUMS[1], SUMS[2][:, None], SUMS[3], loss="sigmoid", beta=0.1)
    with pytest.raises(ValueError, match=r"rejected has shape \(4,\)"):
        reward_loss(np.zeros(5), np.zeros(4))
    with pytest.raises(ValueError, match=r"margin has shape \(1,\)"):
        reward_loss(np.zeros(5), np.zeros(5), np.zeros(1))
    with pytest.raises(ValueError, match=r"it must be \[P, K\] with at least 2"):
        ranked_loss(np.zeros((3, 1)))
