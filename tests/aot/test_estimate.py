"""The estimate of the excerpt's step, computed by hand, and the ring model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from bc2_jax.aot.estimate import (
    CYCLES_HBM_SHARE,
    UNKNOWN_KERNEL_EFFICIENCY,
    Links,
    Traffic,
    audit,
    estimate_step,
    kernel_efficiency,
)
from bc2_jax.aot.program import Collective, Program, parse_instruction
from bc2_jax.tpu.chips import CHIPS, Topology, parse_topology
from bc2_jax.tpu.rates import KERNEL_CYCLES, Rates, default_rates

TEXT = (Path(__file__).parent / "data" / "scan_v5p_2x2x1.txt").read_text()
CLOCK = 1.75e9


def coordinates(topology: Topology) -> list[tuple[int, ...]]:
    """Of the devices in row-major order, slice by slice."""
    sides = (range(topology.num_slices), *map(range, topology.shape))
    return list(itertools.product(*sides))


def estimate(text: str, name: str = "v5p:2x2x1", rates: Rates | None = None):
    topology = parse_topology(name)
    return estimate_step(Program(text), topology, coordinates(topology), rates)


def test_by_hand():
    e = estimate(TEXT)
    assert e.matmul == pytest.approx(5 * (5748 + 8824 + 5943) / CLOCK)
    # Before the loops, in the forward loop, in the backward loop.
    vector = (2944 + 4675 + 3131) + 5 * (2432 + 3773 + 2944 + 2944) + 5 * (2944 + 2424)
    assert e.vector_raw == pytest.approx(vector / CLOCK)
    assert CYCLES_HBM_SHARE / 0.85 * e.vector_raw <= e.vector <= e.vector_raw
    # 512 x 512 x bf16, three quarters of it over one link in each of two dimensions, which do not close at size 2.
    exchange = 512 * 512 * 2 * 3 / 4 / (2 * 90e9)
    # The gather waits; the scatter runs beside a matmul of 5943 cycles, which is longer.
    assert e.exposed == pytest.approx(5 * exchange)
    assert e.hidden == pytest.approx(5 * exchange)
    assert e.kernels == pytest.approx(1e9 / 459e12 / KERNEL_CYCLES[0].efficiency)
    assert e.seconds == pytest.approx(e.matmul + e.vector + e.kernels + e.exposed)
    assert e.seconds_high == pytest.approx(e.matmul + e.vector_raw + e.kernels + 10 * exchange)
    assert e.collectives["all-gather"].asynchronous_bytes == 0
    assert e.collectives["reduce-scatter"] == Traffic(
        5 * 2**19, 5, 5 * 2**19, seconds=pytest.approx(5 * exchange)
    )  # fmt: skip


def test_a_collective_longer_than_what_runs_beside_it_is_exposed_in_part():
    e = estimate(TEXT.replace('"estimated_cycles":"5943"', '"estimated_cycles":"1000"'))
    exchange = 512 * 512 * 2 * 3 / 4 / (2 * 90e9)
    assert e.exposed == pytest.approx(5 * exchange + 5 * (exchange - 1000 / CLOCK))
    assert e.hidden == pytest.approx(5 * 1000 / CLOCK)


def test_measured_rates_replace_the_defaults():
    default = default_rates(CHIPS["v5p"])
    before = estimate(TEXT)
    half = dataclasses.replace(
        default, link_bandwidth=default.link_bandwidth / 2, attention_forward_share=default.attention_forward_share / 2
    )
    e = estimate(TEXT, rates=half)
    # The gather waits twice as long; the scatter is not hidden any more by a matmul of 5943 cycles.
    exchange = 512 * 512 * 2 * 3 / 4 / 90e9
    assert e.exposed == pytest.approx(5 * exchange + 5 * max(exchange - 5943 / CLOCK, 0))
    assert e.kernels == pytest.approx(2 * before.kernels)
    # A share that its matmuls, which are small, do not reach by the compiler's cycles either.
    assert before.matmul == before.matmul_raw
    slow = estimate(TEXT, rates=dataclasses.replace(default, matmul_share=0.01))
    assert slow.matmul > before.matmul == slow.matmul_raw
    assert slow.seconds_high - before.seconds_high == pytest.approx(slow.matmul - before.matmul)
    late = estimate(TEXT, rates=dataclasses.replace(default, collective_latency=1.0))
    assert late.exposed == pytest.approx(before.exposed + 10, rel=1e-3)


def test_kernels_take_the_cycles_of_the_same_mxu():
    def share(generation: str, name: str = "flash_forward.1", head: int = 128, path: str = "a") -> float:
        line = f'%{name} = bf16[1,4096,{head}] custom-call(%q), metadata={{op_name="{path}/pallas_call"}}'
        return kernel_efficiency(parse_instruction(line), CHIPS[generation], default_rates(CHIPS[generation]))

    v5p, v5p_backward, v6e, v6e_backward = (kernel.efficiency for kernel in KERNEL_CYCLES)
    assert share("v5e") == pytest.approx(v5p) and share("tpu7x") == pytest.approx(v6e)
    assert share("v6e", head=64) == pytest.approx(v6e / 2) and share("v6e", head=256) == pytest.approx(v6e)
    assert share("v6e", "flash_backward.2") == pytest.approx(v6e_backward)
    # Without a name of its own, by its pass; a forward kernel that the backward pass runs again, by its name.
    assert share("v5p", "call.1", path="transpose(jvp())/attention") == pytest.approx(v5p_backward)
    assert share("v5p", path="transpose(jvp())/rematted_computation/attention") == pytest.approx(v5p)
    assert share("v5p", "other.1") == UNKNOWN_KERNEL_EFFICIENCY


def test_a_slice_of_stacked_layers_moves_only_the_slice():
    """A fusion that copies one of 32 layers reads and writes 32 MiB each, and does not read the whole stack."""
    cycles = 'backend_config={"window_config":{"estimated_cycles":"100000"}}'
    text = f"""HloModule m, is_scheduled=true, num_partitions=4

%slice_layer (s: bf16[32,4096,4096], i: s32[]) -> bf16[1,4096,4096] {{
  %s = bf16[32,4096,4096]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = bf16[1,4096,4096]{{2,1,0}} dynamic-slice(%s, %i, %z, %z), dynamic_slice_sizes={{1,4096,4096}}
}}

ENTRY %main (p: bf16[32,4096,4096], i: s32[]) -> bf16[1,4096,4096] {{
  %p = bf16[32,4096,4096]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = bf16[1,4096,4096]{{2,1,0}} fusion(%p, %i), kind=kLoop, calls=%slice_layer, {cycles}
}}
"""
    e = estimate(text)
    assert e.vector_raw == pytest.approx(100_000 / CLOCK)
    assert e.vector == pytest.approx(2 * 2**25 / (0.85 * 2765e9), rel=1e-6)


def test_a_fused_collective_proceeds_only_in_the_fusions_that_carry_it():
    """As on v5e. A matmul of 0.1 ms carries the gather of 0.2 ms, a copy between it and the end does not."""
    gather = "all-gather(%a), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}"
    cycles = 'backend_config={"window_config":{"estimated_cycles":"150000"}}'
    text = f"""HloModule m, is_scheduled=true, num_partitions=4

%begin (a: bf16[3000,1000]) -> bf16[12000,1000] {{
  %a = bf16[3000,1000]{{1,0}} parameter(0)
  %g = bf16[12000,1000]{{1,0}} {gather}
  ROOT %c = bf16[12000,1000]{{1,0}} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%go_on (a: bf16[3000,1000]) -> bf16[12000,1000] {{
  %a = bf16[3000,1000]{{1,0}} parameter(0)
  %g = bf16[12000,1000]{{1,0}} {gather}
  %w = bf16[100,100]{{1,0}} slice(%a)
  ROOT %d = bf16[12000,1000]{{1,0}} dot(%a, %w)
}}

%end (a: bf16[3000,1000]) -> bf16[12000,1000] {{
  %a = bf16[3000,1000]{{1,0}} parameter(0)
  %g = bf16[12000,1000]{{1,0}} {gather}
  ROOT %f = bf16[12000,1000]{{1,0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: bf16[3000,1000]) -> bf16[12000,1000] {{
  %p = bf16[3000,1000]{{1,0:S(1)}} parameter(0)
  %s = bf16[12000,1000]{{1,0:S(1)}} fusion(%p), kind=kCustom, calls=%begin
  %m = bf16[12000,1000]{{1,0:S(1)}} fusion(%p), calls=%go_on, {cycles}
  %x = f32[10000000]{{0}} copy(%p), {cycles}
  ROOT %e = bf16[12000,1000]{{1,0:S(1)}} fusion(%p), kind=kCustom, calls=%end
}}
"""
    e = estimate(text, "v5e:2x2")
    # Two links that do not close to rings, three quarters of the tensor.
    exchange = 12_000_000 * 2 * 3 / 4 / (2 * 45e9)
    assert e.matmul == e.hidden == pytest.approx(1e-4)
    assert e.vector > 0.4e-4
    assert e.exposed == pytest.approx(exchange - 1e-4)


def test_a_kernel_without_a_cost_is_reported():
    silent = TEXT.replace('"flops":"1000000000"', '"flops":"0"').replace('"bytes_accessed":"524288"', '"a":"0"')
    e = estimate(silent)
    assert e.kernels == 0
    assert e.warnings == ("Kernel flash_forward.1 declares no cost; it counts as nothing.",)


def seconds(kind: str, group: tuple[int, ...], name: str, slices: int = 1, size: int = 10**9) -> float:
    topology = parse_topology(name, slices)
    return Links(topology, coordinates(topology), default_rates(topology.chip)).seconds(
        Collective(kind, size, "bf16", group, "")
    )


def test_rings():
    everyone = tuple(range(64))
    gather = seconds("all-gather", everyone, "v5p:4x4x4")
    assert gather == pytest.approx(1e9 * 63 / 64 / (6 * 90e9))
    assert seconds("reduce-scatter", everyone, "v5p:4x4x4") == gather
    assert seconds("all-reduce", everyone, "v5p:4x4x4") == 2 * gather
    # Along one dimension of four: two links.
    assert seconds("all-gather", (0, 1, 2, 3), "v5p:4x4x4") == pytest.approx(1e9 * 3 / 4 / (2 * 90e9))
    # Half of a ring does not close.
    assert seconds("all-gather", (0, 1), "v5p:4x4x4") == pytest.approx(1e9 / 2 / 90e9)
    assert seconds("all-gather", tuple(range(256)), "v5e:16x16") == pytest.approx(1e9 * 255 / 256 / (4 * 45e9))
    # 8 x 16: eight chips in a row are not a ring.
    assert seconds("all-gather", tuple(range(128)), "v5e:8x16") == pytest.approx(1e9 * 127 / 128 / (3 * 45e9))
    assert seconds("collective-permute", (0, 1), "v5e:16x16") == pytest.approx(1e9 / 45e9)
    assert seconds("all-gather", (5,), "v5p:4x4x4") == 0


def test_between_slices_each_chip_sends_its_share():
    # Slice 0 and slice 1, the same chip: all of it over the network.
    assert seconds("all-reduce", (0, 64), "v5p:4x4x4", 2) == pytest.approx(2 * 1e9 / 2 / 6.25e9)
    both = seconds("all-reduce", tuple(range(128)), "v5p:4x4x4", 2)
    assert both == pytest.approx(2 * (1e9 * 63 / 64 / (6 * 90e9) + 1e9 / 64 / 2 / 6.25e9))


def test_audit():
    traffic = {
        "all-gather": Traffic(bytes=100),
        "all-reduce": Traffic(bytes=70, gather_bytes=50),
        "reduce-scatter": Traffic(bytes=90),
    }
    a = audit(traffic, 55, is_gathered=True, is_reduced=True)
    assert (a.gathered_bytes, a.gathered_needed, a.reduced_bytes, a.reduced_needed) == (150, 110, 110, 110)
    assert a.complete
    assert not audit(traffic, 56, is_gathered=True, is_reduced=True).complete
    assert audit({}, 56, is_gathered=False, is_reduced=False).complete


def test_a_transfer_between_slices_ends_with_its_receive():
    rendezvous = (
        'frontend_attributes={_xla_host_transfer_rendezvous="r",_xla_host_transfer_handler_name="xla_megascale"}'
    )
    text = f"""HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (p: f32[1000000]) -> f32[1000000] {{
  %p = f32[1000000]{{0}} parameter(0)
  %a = token[] after-all()
  %s = (f32[1000000]{{0}}, u32[], token[]) send(%p, %a), {rendezvous}
  %r = (f32[1000000]{{0}}, u32[], token[]) recv(%a), {rendezvous}
  %c = f32[1000000]{{0}} copy(%p), backend_config={{"window_config":{{"estimated_cycles":"175000"}}}}
  %sd = token[] send-done(%s), {rendezvous}
  ROOT %rd = (f32[1000000]{{0}}, token[]) recv-done(%r), {rendezvous}
}}
"""
    topology = parse_topology("v5p:2x2x1", 2)
    e = estimate_step(Program(text), topology, coordinates(topology))
    # Half of it there and half back, at 50 Gbit/s a chip, beside a copy of 0.1 ms at most.
    assert e.hidden + e.exposed == pytest.approx(4e6 / 6.25e9)
    assert e.hidden == pytest.approx(e.vector)
    assert 0.4e-4 < e.vector <= 1e-4
