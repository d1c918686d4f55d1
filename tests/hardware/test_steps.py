"""Training and decoding steps, and the split of a TPU's profile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bc2_jax.aot.program import Program
from bc2_jax.hardware.device import Device
from bc2_jax.hardware.profile import CLASSES, own_times, read_planes, split
from bc2_jax.hardware.steps import choose_sizes, measure_decoding, measure_training
from bc2_jax.tpu.chips import CHIPS, GIB

CPU = Device("cpu", "cpu", None, 2**31, 8)
HLO = """HloModule step, num_partitions=4

%fused_dot (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8] parameter(0)
  ROOT %dot.1 = f32[8,8] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (b: f32[8,8]) -> f32[8,8] {
  %b = f32[8,8] parameter(0)
  %fusion.1 = f32[8,8] fusion(%b), kind=kOutput, calls=%fused_dot
  %flash_forward.1 = f32[8,8] custom-call(%fusion.1), custom_call_target="tpu_custom_call"
  ROOT %add.1 = f32[8,8] add(%flash_forward.1, %b)
}

%condition (c: f32[8,8]) -> pred[] {
  %c = f32[8,8] parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  %all-gather-start.1 = (f32[8,8], f32[32,8]) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %while.1 = f32[8,8] while(%x), condition=%condition, body=%body
  %all-gather-done.1 = f32[32,8] all-gather-done(%all-gather-start.1)
  ROOT %copy.1 = f32[8,8] copy(%while.1)
}
"""


def plane(name: str, *events: tuple[str, float, float]) -> SimpleNamespace:
    """A TPU's plane: whole lines of the program as names, beside lines that are not of instructions."""
    named = [SimpleNamespace(name=n, start_ns=s, duration_ns=d, stats=[]) for n, s, d in events]
    steps = [SimpleNamespace(name="1", start_ns=0, duration_ns=1e9, stats=[])]
    lines = [SimpleNamespace(name="Steps", events=steps), SimpleNamespace(name="XLA Ops", events=named)]
    return SimpleNamespace(name=name, lines=lines)


def test_a_profile_is_split_by_what_the_instructions_are():
    """A loop's event spans those of its body; the wait for the gather is its end."""
    events = [
        ("%all-gather-start.1 = (f32[8,8]) all-gather-start(%x)", 0, 1), ("%while.1 = f32[8,8] while(%x)", 10, 100),
        ("%fusion.1 = f32[8,8] fusion(%b)", 10, 30), ("flash_forward.1", 40, 20), ("%add.1", 60, 5),
        ("%fusion.1 = f32[8,8] fusion(%b)", 65, 30), ("%all-gather-done.1", 110, 40), ("copy.1", 150, 7),
    ]  # fmt: skip
    names = ("/host:CPU", "/device:TPU:0", "/device:TPU:1", "/device:TPU:0 SparseCore 0")
    lines = read_planes([plane(name, *events) for name in names])
    assert len(lines) == 2
    assert own_times(lines[0])["while.1"] == 100 - 30 - 20 - 5 - 30
    found = split(lines, 1, 2, Program(HLO, open_trips=1))
    assert found == pytest.approx({"matmul": 60e-9, "vector": 27e-9, "kernels": 20e-9, "exposed": 41e-9})
    # Without the program by name: a fusion may be anything.
    by_name = split(lines, 2, 2, None)
    assert by_name["exposed"] == pytest.approx(41e-9 / 2) and by_name["kernels"] == pytest.approx(20e-9 / 2)


def test_the_model_grows_with_the_memory():
    def layers(memory: float, count: int = 1) -> tuple[int, int]:
        model = choose_sizes(Device("tpu", "TPU", CHIPS["v5e"], int(memory * GIB), count)).model
        return model.hidden_size, model.num_hidden_layers

    assert layers(8) == (2048, 4) and layers(15.75) == (4096, 2) and layers(95) == (4096, 8)
    assert layers(15.75, 4) == (4096, 8)


def test_steps_run_on_eight_devices():
    """The loss of a repeated batch falls, and the parts of the profile are within the time of all threads."""
    training = measure_training(CPU)
    assert training.status == "measured" and "needs the scheduled program of a known TPU" in training.text
    assert training.details["losses"][-1] < training.details["losses"][0]
    lines = {line.name: line.measured for line in training.lines}
    assert lines["training step"] > 0 and lines["training step: matmul"] > 0 and lines["training step: exposed"] > 0
    assert {name.partition(": ")[2] for name in lines} <= {"", "device idle", *CLASSES}
    decoding = measure_decoding(Device("cpu", "cpu", None, 2**31, 8))
    assert decoding.status == "measured" and decoding.details["tokens_per_call"] == 2 * 4 * 8
