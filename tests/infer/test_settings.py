"""Settings that are refused by name, and the arrays made of those that are not."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from bc2_jax.config import BAICHUAN2_7B
from bc2_jax.infer.settings import MOST_BIASES, MOST_EOS, Sampling, Settings, sampling_of

V = BAICHUAN2_7B.vocab_size
LEGAL_BIAS = f"None, or at most 300 ids in 0..{V - 1}, each with a number, -100 to 100"
NOTHING = Settings().check(BAICHUAN2_7B)


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        *[(name, value, "a number, -2 to 2") for name in ("presence_penalty", "frequency_penalty")
          for value in (2.1, -2.1, float("nan"), True, "1", None, [1.0], 10**400)],
        *[("min_tokens", value, "a whole number, at least 0") for value in (-1, 1.0, True, None, "3")],
        *[("logit_bias", value, LEGAL_BIAS) for value in (
            {V: 1.0}, {-1: 1.0}, {"5": 1.0}, {True: 1.0}, {5: 100.5}, {5: float("nan")}, {5: None}, {5: True}, {1.5: 1},
            [(5, 1.0)], "5", 5, dict.fromkeys(range(301), 1))],
    ],
)  # fmt: skip
def test_illegal_values_are_refused_by_name(name, value, legal):
    with pytest.raises(ValueError, match=f"^{name} = ") as caught:
        Settings(**{name: value}).check(BAICHUAN2_7B)
    assert str(caught.value).endswith(f" is not valid: it must be {legal}.")


def test_min_tokens_needs_another_token_than_eos():
    for settings in (Settings(eos_token_id=[0, 1], vocab_size=2), Settings(eos_token_id=range(16), vocab_size=16)):
        settings.check(BAICHUAN2_7B)
        with pytest.raises(ValueError, match="^min_tokens = 1 is not valid: it must be 0 where every id that may be"):
            dataclasses.replace(settings, min_tokens=1).check(BAICHUAN2_7B)
    Settings(eos_token_id=range(16), vocab_size=17, min_tokens=1).check(BAICHUAN2_7B)


def test_checked_settings_are_plain_and_check_again():
    given = Settings(
        presence_penalty=np.float32(0.5), frequency_penalty=-2, logit_bias={np.int64(5): np.float32(1), 7: -100},
        min_tokens=np.int32(4),
    )  # fmt: skip
    checked = given.check(BAICHUAN2_7B)
    assert checked.check(BAICHUAN2_7B) == checked
    assert json.dumps(dataclasses.asdict(checked)["logit_bias"]) == '{"5": 1.0, "7": -100.0}'
    assert (checked.presence_penalty, checked.frequency_penalty, checked.min_tokens) == (0.5, -2.0, 4)
    assert Settings(logit_bias={}).check(BAICHUAN2_7B) == NOTHING
    assert Settings(logit_bias=dict.fromkeys(range(MOST_BIASES), 1)).check(BAICHUAN2_7B).logit_bias is not None


def test_arrays_that_no_row_uses_are_none_unless_all_are_asked_for():
    optional = {
        "vocab_size",
        "min_tokens",
        "presence_penalty",
        "frequency_penalty",
        "bias_ids",
        "bias",
        "top_log_probs",
    }
    plain, full = sampling_of([NOTHING] * 2, [0, 1]), sampling_of([NOTHING] * 2, [0, 1], full=True)
    assert {name for name, x in plain._asdict().items() if x is None} == optional | {"log_prob_temperature"}
    assert {name for name, x in full._asdict().items() if x is None} == {"log_prob_temperature"}
    penalties = {"presence_penalty", "frequency_penalty"}
    used = [
        ({"vocab_size": 9}, {"vocab_size"}), ({"min_tokens": 1}, {"min_tokens"}),
        ({"logit_bias": {4: 1}}, {"bias_ids", "bias"}), *[({name: 1.0}, penalties) for name in penalties],
    ]  # fmt: skip
    for options, names in used:
        some = sampling_of([NOTHING, Settings(**options).check(BAICHUAN2_7B)], [0, 1])
        assert {name for name in optional if getattr(some, name) is not None} == names
    scored = sampling_of([NOTHING] * 2, [0, 1], 0.5, top_log_probs=[None, 3])
    assert scored.top_log_probs.tolist() == [-1, 3] and scored.log_prob_temperature.tolist() == [0.5, 0.5]


def test_shapes_and_values_of_the_arrays():
    rows = [
        Settings(max_new_tokens=2**40, top_k=2**50, seed=2**32 - 1, eos_token_id=[5, 6], logit_bias={9: 1.5, 3: -2}),
        Settings(min_tokens=2**33, temperature=0, vocab_size=77, presence_penalty=1),
    ]
    arrays = sampling_of([row.check(BAICHUAN2_7B) for row in rows], [4, 0], full=True)
    most = 2**31 - 1
    expected = {
        "temperature": [np.float32(0.3), 0], "top_k": [most, 5], "top_p": [np.float32(0.85)] * 2,
        "repetition_penalty": [np.float32(1.05)] * 2, "seed": [2**32 - 1, 0], "place": [4, 0], "limit": [most, 2048],
        "vocab_size": [most, 77], "min_tokens": [0, most], "presence_penalty": [0, 1], "frequency_penalty": [0, 0],
        "top_log_probs": [-1, -1],
    }  # fmt: skip
    for name, values in expected.items():
        assert getattr(arrays, name).tolist() == values
    wide = np.full((2, MOST_EOS), -1)
    wide[0, :2], wide[1, 0] = [5, 6], BAICHUAN2_7B.eos_token_id
    np.testing.assert_array_equal(arrays.eos_token_id, wide)
    assert arrays.bias_ids[0, :3].tolist() == [9, 3, -1] and arrays.bias[0, :3].tolist() == [1.5, -2, 0]
    assert (arrays.bias_ids[1] == -1).all() and arrays.bias.shape == (2, MOST_BIASES)
    assert all(x.dtype in (np.float32, np.int32, np.uint32) for x in jax.tree.leaves(arrays))
    assert isinstance(arrays, Sampling)
