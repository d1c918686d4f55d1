"""Compiler options as data."""

from __future__ import annotations

import pytest

from bc2_jax.tpu.chips import CHIPS
from bc2_jax.tpu.options import INFERENCE_OPTIONS, OPTIONS, compiler_options


def test_every_option_has_a_reason_and_an_effect():
    assert set(OPTIONS) == set(CHIPS)
    for options in OPTIONS.values():
        for option in options:
            for text in (option.reason, option.effect):
                assert text and "\n" not in text, option
        assert len({option.name for option in options}) == len(options)


def test_collectives_run_on_sparse_cores_where_there_are_any():
    name = "xla_tpu_enable_sparse_core_collective_offload_all_gather"
    for generation in ("v4", "v5e"):
        assert name not in compiler_options(generation)
    for generation in ("v5p", "v6e"):
        assert compiler_options(generation)[name] is True
        assert compiler_options(generation)["xla_tpu_enable_async_collective_fusion"] is False


def test_fusion_of_collectives_is_for_v5e_alone():
    """On other generations it may hang or compute wrong values."""
    fused = [name for name in OPTIONS if compiler_options(name).get("xla_tpu_enable_async_collective_fusion")]
    assert fused == ["v5e"]


def test_values():
    v5p = compiler_options("v5p")
    assert v5p["xla_tpu_scoped_vmem_limit_kib"] == 50_000
    assert v5p["xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter"] is True
    assert compiler_options("v5e")["xla_tpu_scoped_vmem_limit_kib"] == 32768
    assert all("xla_jf_spmd_threshold_for_windowed_einsum_mib" in compiler_options(name) for name in OPTIONS)


def test_inference_adds_its_own():
    for name in OPTIONS:
        added = compiler_options(name, inference=True).items() - compiler_options(name).items()
        assert added == {("xla_tpu_enable_dot_strength_reduction", False)}
    assert all(option.reason for option in INFERENCE_OPTIONS)


def test_overrides():
    name = "xla_tpu_scoped_vmem_limit_kib"
    assert compiler_options("v5p", (f"{name}=65536",))[name] == 65536
    assert name not in compiler_options("v5p", (f"{name}=",))
    assert compiler_options("v5p", ("xla_a=True", "xla_b=x"))["xla_a"] is True
    for bad in ("xla_a", "=1", "--xla_a=1"):
        with pytest.raises(ValueError, match="write name=value"):
            compiler_options("v5p", (bad,))
    with pytest.raises(ValueError, match="one of v4, v5e"):
        compiler_options("v2")
