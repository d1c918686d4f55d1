"""Bytes and FLOPs of a decoding step's matmul, and what the estimate makes of them; the program is made up."""

from __future__ import annotations

import pytest

from bc2_jax.aot.estimate import estimate_step
from bc2_jax.aot.program import Program
from bc2_jax.aot.traffic import matmul_flops, moved_bytes
from bc2_jax.tpu.chips import parse_topology

# A layer's weights are sliced out of those of four, two computations down; the product goes into a cache of ten slots.
TEXT = """HloModule m, is_scheduled=true

%slice (p: bf16[4,512,256], i: s32[]) -> bf16[512,256] {
  %p = bf16[4,512,256]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,512,256]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,512,256}
  ROOT %b = bf16[512,256]{1,0} bitcast(%s)
}

%pass (x: bf16[8,512]) -> bf16[8,512] {
  %x = bf16[8,512]{1,0} parameter(0)
  ROOT %y = bf16[8,512]{1,0} bitcast(%x)
}

%fused (a: bf16[8,512], w: bf16[4,512,256], j: s32[], c: bf16[8,10,256]) -> bf16[8,10,256] {
  %a = bf16[8,512]{1,0} parameter(0)
  %w = bf16[4,512,256]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %c = bf16[8,10,256]{2,1,0} parameter(3)
  %f = bf16[512,256]{1,0} fusion(%w, %j), kind=kLoop, calls=%slice
  %g = bf16[8,512]{1,0} fusion(%a), kind=kLoop, calls=%pass
  %m = bf16[8,256]{1,0} convolution(%g, %f), dim_labels=bf_io->bf
  %n = bf16[8,1,256]{2,1,0} bitcast(%m)
  %k = s32[] constant(0)
  ROOT %u = bf16[8,10,256]{2,1,0} dynamic-update-slice(%c, %n, %k, %j, %k)
}

ENTRY %main (a: bf16[8,512], w: bf16[4,512,256], j: s32[], c: bf16[8,10,256]) -> bf16[8,10,256] {
  %a = bf16[8,512]{1,0} parameter(0)
  %w = bf16[4,512,256]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %c = bf16[8,10,256]{2,1,0} parameter(3)
  ROOT %r = bf16[8,10,256]{2,1,0} fusion(%a, %w, %j, %c), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"900"}
}
"""  # noqa: E501
WEIGHTS, INPUT, OUTPUT = 512 * 256 * 2, 8 * 512 * 2, 8 * 256 * 2


def moved(text: str) -> int:
    program = Program(text)
    entry = program.computations[program.entry]
    return moved_bytes(program, entry.instructions[-1], entry)


def test_only_what_is_touched_counts():
    assert moved(TEXT) == WEIGHTS + INPUT + OUTPUT + 4  # and the index
    in_vmem = TEXT.replace("%a = bf16[8,512]{1,0} param", "%a = bf16[8,512]{1,0:S(1)} param")
    assert moved(in_vmem) == WEIGHTS + OUTPUT + 4


def test_flops():
    program = Program(TEXT)
    assert matmul_flops(program, program.computations[program.entry].instructions[-1]) == 2 * 8 * 512 * 256


def test_a_matmul_that_hbm_binds_gets_a_range():
    topology = parse_topology("v5e:1x1")
    face, streamed = (
        estimate_step(Program(TEXT), topology, [(0, 0, 0)], streams_weights=streams) for streams in (False, True)
    )
    assert face.matmul == face.matmul_raw == streamed.matmul_raw == 900 / 1.5e9
    assert streamed.matmul == pytest.approx((WEIGHTS + INPUT + OUTPUT + 4) / (0.85 * 819e9))
    assert streamed.seconds < streamed.seconds_high == face.seconds_high


def test_a_matmul_that_the_mxu_binds_does_not():
    # Few columns of weights to read and many rows.
    text = TEXT.replace("bf16[8,", "bf16[8192,").replace('"900"', '"40000"')
    e = estimate_step(Program(text), parse_topology("v5e:1x1"), [(0, 0, 0)], streams_weights=True)
    assert e.matmul < e.matmul_raw
    wide = text.replace("256", "4096").replace("512", "4096").replace('"40000"', '"3000000"')
    e = estimate_step(Program(wide), parse_topology("v5e:1x1"), [(0, 0, 0)], streams_weights=True)
    assert e.matmul == e.matmul_raw
