"""GRPO's functions against golden numbers and the definition."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align import grpo

GOLDEN = Path(__file__).parents[1] / "golden" / "align"
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "ppo.npz") as tokens, np.load(GOLDEN / "grpo.npz") as file:
        return {**tokens, **file}


def test_the_advantages_of_groups(golden):
    group = int(golden["group_size"])
    np.testing.assert_allclose(grpo.group_advantages(golden["scores"], group), golden["advantages"], **CLOSE)
    unscaled = grpo.group_advantages(golden["scores"], group, scale=False)
    np.testing.assert_allclose(unscaled, golden["advantages_unscaled"], **CLOSE)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=7, max_size=7), st.integers(0, 1000))
def test_groups_of_any_size_and_place(group, seed):
    rng, group = np.random.default_rng(seed), np.array(group)
    scores = rng.normal(size=len(group)).astype(np.float32)
    found = jax.jit(grpo.group_advantages)(scores, group)
    for index in set(group.tolist()):
        mine = scores[group == index].astype(np.float64)
        spread = mine.std(ddof=1) if len(mine) > 1 else 0.0
        np.testing.assert_allclose(found[group == index], (mine - mine.mean()) / (spread + 1e-4), atol=2e-4, rtol=1e-4)


def test_equal_scores_teach_nothing_and_integers_are_scores():
    np.testing.assert_array_equal(grpo.group_advantages(np.full(6, 0.1, np.float32), 3), 0)
    np.testing.assert_array_equal(grpo.group_advantages(np.full(3, 0.7, np.float32), 1), 0)
    np.testing.assert_array_equal(
        grpo.group_advantages(jnp.array([0, 1, 1, 0]), 2), grpo.group_advantages(np.float32([0, 1, 1, 0]), 2)
    )
    for size in (0, 4):
        with pytest.raises(ValueError, match=f"group = {size} is not valid: it must be positive and divide the 6"):
            grpo.group_advantages(np.zeros(6), size)


@pytest.mark.parametrize(("reduction", "name"), [("grpo", "grpo"), ("dapo", "bnpo_dapo"), ("dr_grpo", "dr_grpo")])
def test_the_loss_and_its_reductions(golden, reduction, name):
    """Of the batch, and of its parts added up."""
    clip, beta, most = float(golden["clip"]), float(golden["beta"]), int(golden["max_completion_length"])
    names = ("new_logps", "old_logps", "ref_logps", "advantages", "mask")
    found = grpo.token_loss(*(golden[n] for n in names), clip, beta).loss
    np.testing.assert_allclose(found, np.where(golden["mask"], golden["token_loss"], 0), **CLOSE)
    parts = [grpo.reduce_tokens(found[i], golden["mask"][i], reduction, most) for i in (slice(0, 2), slice(2, 6))]
    total, weight = (sum(x) for x in zip(*parts, strict=True))
    np.testing.assert_allclose(total / weight, golden[f"loss/{name}"], **CLOSE)


def test_padding_holds_what_it_likes(golden):
    mask = golden["mask"]

    def loss(new, old, reference):
        found = grpo.token_loss(new, old, reference, golden["advantages"], mask, 0.2, 0.04)
        total, weight = grpo.reduce_tokens(found.loss, mask, "grpo", 12)
        return total / weight

    arrays = [golden[name] for name in ("new_logps", "old_logps", "ref_logps")]
    expected = jax.value_and_grad(loss)(*(np.where(mask, x, 0) for x in arrays))
    spoilt = jax.value_and_grad(loss)(
        *(np.where(mask, x, value) for x, value in zip(arrays, (np.nan, np.inf, 150), strict=True))
    )
    jax.tree.map(np.testing.assert_array_equal, spoilt, expected)
