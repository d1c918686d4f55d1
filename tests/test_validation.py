"""Numbers that no config can mean are refused at once, in one short sentence."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B, MeshConfig, ModelConfig
from bc2_jax.validation import choices, divisors, show

FIELDS = {field.name: str(field.type) for field in dataclasses.fields(ModelConfig)}
HUGE = [10**9, 10**12, 2**63, 2**70, 10**400, 10**5000]


def refused(changes: dict, kind: type = ModelConfig) -> str:
    begin = time.perf_counter()
    with pytest.raises(ValueError) as error:
        dataclasses.replace(BAICHUAN2_7B, **changes) if kind is ModelConfig else kind(**changes)
    assert time.perf_counter() - begin < 1
    (field,) = [name for name in changes if f".{name} = " in str(error.value)]
    assert field and "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize("value", HUGE, ids=lambda value: f"{value.bit_length()} bits")
@pytest.mark.parametrize("field", [name for name, kind in FIELDS.items() if kind == "int"])
def test_sizes_beyond_any_model(field, value):
    if (field, value) != ("model_max_length", 10**9):  # long, and costs nothing
        refused({field: value})
    refused({field: -value})


@pytest.mark.parametrize("field", [name for name, kind in FIELDS.items() if kind in ("int", "float")])
@pytest.mark.parametrize("value", [True, "4096", None, [1], float("nan"), float("inf"), 1 + 2j])
def test_what_is_no_number(field, value):
    refused({field: value})


def test_other_kinds_of_right_values():
    assert dataclasses.replace(BAICHUAN2_7B, rope_theta=10_000, vocab_size=np.int64(125_696)) == BAICHUAN2_7B
    refused({"num_hidden_layers": 32.0})
    refused({"normalize_head": 1})
    refused({"position_embedding": ["rope"]})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MeshConfig)])
@pytest.mark.parametrize("value", [True, "8", 2.0, -2, -(10**12)])
def test_meshes(field, value):
    refused({field: value}, MeshConfig)


def test_devices_that_nobody_simulates():
    refused({"num_cpu_devices": 10**12}, MeshConfig)


@given(st.integers(1, 5000))
def test_divisors_are_all_there_are(n):
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("n", [2**62, 10**18 + 9, 720_720**3])
def test_divisors_of_any_number_take_no_time(n):
    begin = time.perf_counter()
    found = divisors(n)
    assert time.perf_counter() - begin < 1
    assert found[0] == 1 and found[-1] == n and found == sorted(found) and not any(n % d for d in found)
    assert len(choices(found)) < 1500


def test_long_values_are_cut():
    assert show("x" * 10**6).startswith("'xxx") and len(show("x" * 10**6)) < 310
    assert show("rope") == "'rope'"
