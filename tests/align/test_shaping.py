"""What the updates are given: golden numbers through the layout of rows, running statistics, the coefficient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align import shaping
from bc2_jax.align.experience import lay_out, short_names
from bc2_jax.align.prompts import Prompt
from bc2_jax.align.reward_functions import RewardFunction
from bc2_jax.align.shaping import ADVANTAGE, OLD, REFERENCE, RETURN, VALUE, RunningScores
from bc2_jax.config import PPOConfig
from bc2_jax.data.batch import IGNORED
from bc2_jax.infer.generate import Continuation

GOLDEN = Path(__file__).parents[1] / "golden" / "align"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "ppo.npz") as tokens, np.load(GOLDEN / "grpo.npz") as groups:
        return {**tokens, **{f"grpo/{name}": x for name, x in groups.items()}}


def rows_of(golden) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(mask, positions of the last tokens, log-probabilities and values) behind prompts of 3 to 8 tokens."""
    mask, starts = golden["mask"].astype(bool), np.arange(2, 8)
    names = {OLD: "old_logps", REFERENCE: "ref_logps", VALUE: "values", "mask": "mask"}
    wide = {name: np.full((6, 22), 7.0, np.float32) for name in names}
    wide["mask"][:] = 0
    for row, start in enumerate(starts):
        for name, source in names.items():
            wide[name][row, start : start + 12] = golden[source][row]
    return wide.pop("mask").astype(bool), starts + mask.sum(1), wide


def test_advantages_and_returns_are_those_of_the_formulas(golden):
    mask, last, found = rows_of(golden)
    config = PPOConfig(prompts_per_step=6, minibatches=1)
    cut = np.zeros(6, bool)
    fields, metrics = shaping.shape(config, mask, last, cut, found, golden["scores"], 0.2)
    assert fields.keys() == set(shaping.fields_of(config))
    for name, expected in (
        (ADVANTAGE, "advantages_whitened"),
        (RETURN, "returns"),
        (OLD, "old_logps"),
        (VALUE, "values"),
    ):
        real = golden["mask"].astype(bool)
        np.testing.assert_allclose(fields[name][mask], golden[expected][real], rtol=2e-6, atol=2e-6)
        assert not fields[name][~mask].any()
    spread = golden["returns"][golden["mask"].astype(bool)]
    left = spread - golden["values"][golden["mask"].astype(bool)]
    assert metrics["explained_variance"] == pytest.approx(1 - left.var() / spread.var(), abs=1e-5)


def test_a_cut_answer_can_go_on_with_the_value_behind_it(golden):
    mask, last, found = rows_of(golden)
    config = PPOConfig(prompts_per_step=6, minibatches=1, bootstrap_cut=True, lam=1.0)
    cut = np.array([True, False, True, False, False, False])
    found[VALUE][np.arange(6), last] = 3.0
    returns = shaping.shape(config, mask, last, cut, found, golden["scores"], 0.0)[0][RETURN]
    # Without a penalty, discount or smoothing the return of every token is the score and what follows.
    for row in range(6):
        np.testing.assert_allclose(returns[row][mask[row]], golden["scores"][row] + 3 * cut[row], atol=1e-5)


def test_groups(golden):
    mask, last, found = rows_of(golden)
    config = PPOConfig(algorithm="grpo", prompts_per_step=2, answers_per_prompt=3, minibatches=1)
    fields, _ = shaping.shape(config, mask, last, np.zeros(6, bool), found, golden["grpo/scores"], 0.2)
    assert fields.keys() == set(shaping.fields_of(config))
    for row in range(6):
        np.testing.assert_allclose(fields[ADVANTAGE][row][mask[row]], golden["grpo/advantages"][row], atol=2e-6)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=5))
def test_running_scores_are_those_of_all_scores(parts):
    running = RunningScores()
    for part in parts:
        running = RunningScores(*running.updated(np.array(part, np.float32)).state())
    x = np.array(sum(parts, []))
    assert running.count == len(x) and running.mean == pytest.approx(x.mean(), abs=1e-9)
    deviation = x.std(ddof=1) if len(x) > 1 and x.std(ddof=1) > 1e-3 else None
    if deviation:
        expected = (x - x.mean()) / deviation
        np.testing.assert_allclose(running.normalized(x.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)


def test_the_coefficient_of_an_iteration():
    config = PPOConfig(kl_steps=10)
    found = [shaping.coefficient_of(config, i, 9.9) for i in (0, 5, 10, 99)]
    np.testing.assert_allclose(found, [0.2, (0.2 * 0.005) ** 0.5, 0.005, 0.005])
    assert shaping.adapt(config, 0.2, 1e9) == 0.2
    adaptive = PPOConfig(kl_schedule="adaptive", kl_target=2.0, kl_horizon=640.0)
    assert shaping.coefficient_of(adaptive, 5, 0.1) == 0.1
    assert shaping.adapt(adaptive, 0.1, 9.0) == pytest.approx(0.102)
    assert shaping.adapt(adaptive, 0.1, 0.0) == pytest.approx(0.098)


def test_answers_lie_behind_their_prompts():
    prompts = [Prompt([{"role": "user", "content": "a"}], {}, "x:1")] * 2
    found = [Continuation([7, 8, 2], "eos", [-1.0, -2.0, -3.0]), Continuation([9], "length", [-4.0])]
    answers = lay_out(prompts, [[195, 5, 196], [195, 196]], found, ["78", "9"], 8)
    assert answers.rows["input_ids"].tolist() == [[195, 5, 196, 7, 8, 2, 0, 0], [195, 196, 9, 0, 0, 0, 0, 0]]
    nothing = IGNORED
    assert answers.rows["labels"].tolist() == [
        [nothing, nothing, 7, 8, 2, nothing, nothing, nothing], [nothing, 9, *[nothing] * 6],
    ]  # fmt: skip
    assert answers.rows["segment_ids"].tolist() == [[1] * 6 + [0] * 2, [1] * 3 + [0] * 5]
    assert answers.sampled.tolist() == [[0, 0, -1, -2, -3, 0, 0, 0], [0, -4, 0, 0, 0, 0, 0, 0]]
    assert (
        answers.last.tolist() == [5, 2] and answers.tokens.tolist() == [3, 1] and answers.cut.tolist() == [False, True]
    )


def test_reward_functions_have_short_names():
    functions = [RewardFunction(name, len) for name in ("a.py:length", "b.py:length", "m:model", "m:cut")]
    assert list(short_names(functions)) == ["length", "length_1", "model_2", "cut_3"]
