"""A row's tokens and log-probabilities are its own, bit for bit: whatever its neighbours and its place in the batch."""

from __future__ import annotations

import dataclasses

import numpy as np

from bc2_jax.infer.decoding import Reason
from bc2_jax.infer.generate import continue_prompts
from bc2_jax.infer.settings import Settings
from tests.infer.batch import Batch, Prompt, Score, prepared_golden

RNG = np.random.default_rng(0)
LONG, OTHER = RNG.integers(3, 320, (2, 150)).tolist()
"""Three chunks each."""
DRAWN = Settings(
    max_new_tokens=40, temperature=1.0, top_k=0, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.5,
    frequency_penalty=0.3, seed=7, eos_token_id=(), logit_bias={5: 2.0}, min_tokens=3,
)  # fmt: skip
TARGET, GREEDY = Prompt(LONG, DRAWN), Prompt(OTHER)
STEPS = 16
ON_ROWS = (2, 1, 2)  # data, fsdp, tensor


def alone(make) -> list[Score]:
    batch = make()
    batch.fill({0: TARGET})
    batch.decode()
    batch.decode()
    assert len(batch.found[0]) == STEPS + 1
    return batch.found[0]


def check_bits(make, rows: int) -> list[Score]:
    """The target in a row of the last part of the batch, alone and among others; returns what it gets alone."""
    expected, target, source = alone(make), rows - 2, rows - 1
    batch = make()
    batch.fill({0: GREEDY, rows - 3: Prompt(OTHER[:70], DRAWN, place=3)})
    batch.decode(3)
    # Its chunks come while others run; the second beside the first of another prompt.
    batch.extend(0, {target: TARGET})
    batch.decode(2)
    batch.extend({source: 0, target: 64}, {source: GREEDY, target: TARGET})
    batch.decode(1)
    batch.extend({target: 128, source: 64}, {target: TARGET, source: GREEDY})
    batch.decode(1, cancel=[0])
    batch.decode(5)
    batch.extend(0, {0: Prompt([5, 6, 7], DRAWN)})
    batch.decode(8)
    batch.decode(2, cancel=[rows - 3])
    assert batch.found[target] == expected
    assert batch.reasons[0] == batch.reasons[target] == Reason.RUNNING and batch.reasons[rows - 3] == Reason.CANCELLED
    # Its first chunks copied from a row that goes on with another token, over a row that has been used.
    batch.fill({source: Prompt(LONG[:128] + [9, 9])})
    batch.decode(4)
    batch.copy(source, target, 2)
    assert batch.decoding.length_B[target] == 128 and batch.decoding.reason_B[target] == Reason.NO_PROMPT
    batch.decode(2)
    batch.extend(128, {target: TARGET})
    batch.decode()
    batch.decode()
    assert batch.found[target] == expected
    return expected


def test_in_bf16_with_an_int8_cache():
    prepared = prepared_golden("rope-tiny", None, "bfloat16", "int8")
    check_bits(lambda: Batch(prepared), 4)


def test_in_fp32():
    prepared = prepared_golden("alibi-tiny")
    expected = check_bits(lambda: Batch(prepared), 4)
    # `generate` runs programs of its own, with fewer rows, more slots, and without what no row asks for.
    settings = dataclasses.replace(DRAWN, max_new_tokens=120)
    stop = lambda step, tokens: step == STEPS  # noqa: E731  # as short as what it stops
    (found,) = continue_prompts(prepared, [LONG], settings, log_probs=True, on_token=stop)
    assert found.tokens == [score.token for score in expected]
    assert found.log_probs == [score.log_prob for score in expected]


def test_on_a_mesh(mesh_of):
    """Of four rows in each of two parts, two places of each; the tokens are those of one device."""
    prepared = prepared_golden("alibi-tiny", mesh_of(*ON_ROWS))
    found = check_bits(lambda: Batch(prepared, rows=8, places=4), 8)
    expected = alone(lambda: Batch(prepared_golden("alibi-tiny")))
    assert [score.token for score in found] == [score.token for score in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-5)
        np.testing.assert_allclose([x for _, x in one.top], [x for _, x in other.top], atol=1e-5)
