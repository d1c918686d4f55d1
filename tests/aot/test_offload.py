"""Transfers to and from host memory, in text as libtpu 0.0.42 schedules a scanned layer with remat "offload"."""

from __future__ import annotations

import dataclasses

import pytest

from bc2_jax.aot.estimate import estimate_step
from bc2_jax.aot.offload import FROM_HOST, TO_HOST
from bc2_jax.aot.program import Program
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.rates import default_rates

HOST, HBM = "bf16[6,2048,1024]{2,1,0:T(8,128)(2,1)S(5)}", "bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)}"
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"35000"}}'
TEXT = f"""HloModule m, is_scheduled=true

%update (p0: bf16[6,2048,1024], p1: bf16[1,2048,1024], p2: s32[]) -> bf16[6,2048,1024] {{
  %p0 = {HOST} parameter(0)
  %p1 = {HBM} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %u = {HOST} dynamic-update-slice(%p0, %p1, %p2)
}}

%slice (q0: bf16[6,2048,1024], q1: s32[]) -> bf16[1,2048,1024] {{
  %q0 = {HOST} parameter(0)
  %q1 = s32[] parameter(1)
  ROOT %s = {HBM} dynamic-slice(%q0, %q1)
}}

ENTRY %main (h: bf16[6,2048,1024], x: bf16[1,2048,1024], i: s32[]) -> bf16[6,2048,1024] {{
  %h = {HOST} parameter(0)
  %x = {HBM} parameter(1)
  %i = s32[] parameter(2)
  %b = {HBM} bitcast(%x)
  %us = (({HOST}, {HBM}, s32[]), {HOST}, u32[]{{:S(2)}}) async-start(%h, %b, %i), calls=%update
  %ss = (({HOST}, s32[]), {HBM}, u32[]{{:S(2)}}) async-start(%h, %i), calls=%slice
  %y = f32[1000,1000]{{1,0}} copy(%i), {CYCLES}
  %sd = {HBM} async-done(%ss)
  %ud = {HOST} async-done(%us)
  %in_vmem = bf16[1,2048,1024]{{2,1,0:T(8,128)(2,1)S(1)}} copy(%sd)
  ROOT %t = (bf16[6,2048,1024]) tuple(%ud)
}}
"""


def test_both_directions_at_once_and_what_they_hide_behind():
    topology = parse_topology("v6e:1x1")
    rates = dataclasses.replace(default_rates(topology.chip), host_bandwidth=1e10)
    e = estimate_step(Program(TEXT), topology, [(0, 0, 0)], rates)
    one = 2048 * 1024 * 2 / 1e10  # one layer's slice, not the array of all
    assert {kind: (t.bytes, t.count, t.asynchronous_bytes) for kind, t in e.collectives.items()} == {
        TO_HOST: (2**22, 1, 2**22), FROM_HOST: (2**22, 1, 2**22),
    }  # fmt: skip
    assert 0 < e.vector < one
    assert e.exposed == pytest.approx(one - e.vector) and e.hidden == pytest.approx(one + e.vector)


def test_a_copy_that_is_not_asynchronous_is_exposed():
    text = TEXT.replace("ROOT %t", f"%c = {HOST.replace('[6', '[1')} copy(%x)\n  ROOT %t")
    topology = parse_topology("v6e:1x1")
    before, after = (estimate_step(Program(t), topology, [(0, 0, 0)]) for t in (TEXT, text))
    assert after.exposed - before.exposed == pytest.approx(2**22 / 32e9)
    assert after.collectives[TO_HOST].bytes == 2**23
