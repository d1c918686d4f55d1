"""The mesh of a whole slice, and what is said of copies."""

from __future__ import annotations

from bc2_jax.aot.inference import whole_slice_mesh
from bc2_jax.aot.program import Program
from bc2_jax.aot.report import copy_warnings
from bc2_jax.config import MeshConfig
from bc2_jax.tpu.chips import parse_topology


def test_the_whole_slice_shares_each_layer():
    assert whole_slice_mesh(parse_topology("v5e:2x4")) == MeshConfig(data=1, fsdp=1, tensor=8)
    assert whole_slice_mesh(parse_topology("v6e:2x2", 2)) == MeshConfig(data=2, fsdp=1, tensor=4)


def test_large_copies_are_named():
    text = """HloModule m, is_scheduled=true

ENTRY %main (p: bf16[40,8,5,4096,128]) -> bf16[40,8,5,4096,128] {
  %p = bf16[40,8,5,4096,128]{4,3,2,1,0} parameter(0)
  ROOT %c = bf16[40,8,5,4096,128]{4,1,3,2,0} copy(%p)
}
"""
    assert copy_warnings(Program(text)) == ["bf16[40,8,5,4096,128], 1.56 GiB, is copied 1 times."]
