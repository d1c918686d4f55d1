"""The reader of scheduled programs, on the excerpt of one: five layers of matmuls on four v5p chips, with gradients.

data/scan_v5p_2x2x1.txt is what libtpu 0.0.42 made of it, its notes shortened to the fields that are read.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bc2_jax.aot.program import Program, parse_groups, parse_instruction, parse_shapes

TEXT = (Path(__file__).parent / "data" / "scan_v5p_2x2x1.txt").read_text()


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(TEXT)


def test_computations_in_schedule_order(program: Program):
    assert program.entry == "main.7_spmd"
    assert program.num_partitions == 4
    names = [i.name for i in program.computations["wide.region_0.1_spmd.sunk"].instructions]
    assert names.index("all-gather.4") < names.index("copy.33") < names.index("fusion.24")


def test_cycles(program: Program):
    body = program.computations["wide.region_0.1_spmd.sunk"].by_name
    assert body["fusion.24"].cycles == 5748
    assert body["copy.33"].cycles == 2944
    assert body["all-gather.4"].cycles is None


def test_matmuls_are_found_inside_fusions(program: Program):
    matmuls = [i.name for i, _, _ in program.walk() if program.is_matmul(i)]
    assert matmuls == ["fusion.24", "fusion.30", "fusion.29"]


def test_loops_run_as_often_as_their_condition_says(program: Program):
    counts = {i.name: count for i, _, count in program.walk()}
    assert (counts["while.30"], counts["fusion.24"], counts["fusion.30"]) == (1, 5, 5)
    assert program.trip_count(program.computations[program.entry].by_name["while.31"]) == 5


def test_a_noted_trip_count_comes_first(program: Program):
    noted = (
        "%w = s32[] while(%t), condition=%wide.region_1.2_spmd, body=%b, "
        'backend_config={"known_trip_count":{"n":"36"}}'
    )  # fmt: skip
    assert program.trip_count(parse_instruction(noted)) == 36
    unknown = parse_instruction("%w = s32[] while(%t), condition=%bitcast_fusion.clone.1, body=%b")
    with pytest.raises(ValueError, match="Loop w has no constant number"):
        program.trip_count(unknown)
    assert Program(TEXT, open_trips=3).trip_count(unknown) == 3


def test_only_a_counter_gives_a_trip_count():
    """Decoding goes on while a row's reason to end, a byte, is 0."""
    text = """HloModule m, is_scheduled=true

%goes_on (p: (s32[], s8[8], s32[])) -> pred[] {
  %p = (s32[], s8[8], s32[]) parameter(0)
  %zero = s8[] constant(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (q: s32[]) -> s32[] {
  ROOT %q = s32[] parameter(0)
}
"""
    loop = parse_instruction("%w = (s32[], s8[8], s32[]) while(%t), condition=%goes_on, body=%b")
    assert Program(text, open_trips=1).trip_count(loop) == 1


@pytest.mark.parametrize(("start", "trips"), [("constant(0)", 40), ("constant(1)", 39), ("parameter(0)", 40)])
def test_a_loop_whose_first_iteration_was_peeled(start: str, trips: int):
    """As with several slices: the first pass of the layers is outside of the loop, which starts at 1."""
    text = f"""HloModule m, is_scheduled=true

%goes_on (p: (bf16[8], s32[])) -> pred[] {{
  %p = (bf16[8], s32[]) parameter(0)
  %n = s32[] constant(40)
  %i = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%layer (p: (bf16[8], s32[])) -> (bf16[8], s32[]) {{
  ROOT %p = (bf16[8], s32[]) parameter(0)
}}

ENTRY %main (q: s32[]) -> s32[] {{
  %first = s32[] {start}
  %counter = s32[] copy(%first)
  %h = bf16[8] constant({{...}})
  %t = (bf16[8], s32[]) tuple(%h, %counter)
  %w = (bf16[8], s32[]) while(%t), condition=%goes_on, body=%layer
  ROOT %out = s32[] get-tuple-element(%w), index=1
}}
"""
    assert [count for i, where, count in Program(text).walk() if where.name == "layer"] == [trips]


def test_collectives(program: Program):
    found = [c for i, where, _ in program.walk() if (c := program.collective(i, where))]
    assert [(c.kind, c.bytes, c.dtype, c.group) for c in found] == [
        ("all-gather", 512 * 512 * 2, "bf16", (0, 1, 2, 3)),
        # Started on the SparseCore, two computations down; each device keeps [128, 512].
        ("reduce-scatter", 512 * 512 * 2, "bf16", (0, 1, 2, 3)),
    ]
    assert not any(c.gathers for c in found)


PADDED = """HloModule m, is_scheduled=true, num_partitions=2

%padded (a: bf16[8,4], b: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,4]{1,0} parameter(1)
  %z = s32[] constant(0)
  ROOT %d = bf16[8,4]{1,0} dynamic-update-slice(%a, %b, %z, %z)
}

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}

ENTRY %main (p: bf16[8,4], q: bf16[4,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %q = bf16[4,4]{1,0} parameter(1)
  %f = bf16[8,4]{1,0} fusion(%p, %q), kind=kLoop, calls=%padded
  %r = bf16[8,4]{1,0} all-reduce(%f), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = bf16[8,4]{1,0} all-reduce(%r), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_a_gather_made_as_an_all_reduce():
    program = Program(PADDED)
    found = [c for i, where, _ in program.walk() if (c := program.collective(i, where))]
    assert [(c.kind, c.bytes, c.gathers) for c in found] == [("all-reduce", 64, True), ("all-reduce", 64, False)]


def test_kernels_declare_their_cost(program: Program):
    kernel = program.computations[program.entry].by_name["flash_forward.1"]
    assert kernel.opcode == "custom-call"
    assert kernel.backend_config["custom_call_config"]["cost_estimate"]["flops"] == "1000000000"
    assert kernel.op_name == "flash_forward/pallas_call"


def test_start_and_end_of_the_older_form():
    start = parse_instruction(
        "%all-gather-start = (f32[4]{0}, f32[16]{0}, u32[]) all-gather-start(%p), replica_groups=[1,4]<=[4]"
    )
    collective = Program(PADDED).collective(start)
    assert collective is not None and (collective.kind, collective.bytes) == ("all-gather", 64)
    done = parse_instruction("%all-gather-done = f32[16]{0} all-gather-done(%all-gather-start)")
    assert done.operands == ("all-gather-start",)
    assert Program(PADDED).collective(done) is None


def test_shapes():
    text = "(f32[8,1,32]{2,1,0:T(8,128)S(1)}, /*index=1*/bf16[40,100]{1,0:T(8,128)(2,1)}, token[], pred[])"
    first, second, third, fourth = parse_shapes(text)
    assert (first.dtype, first.dims, first.bytes, first.in_hbm) == ("f32", (8, 1, 32), 1024, False)
    assert (second.bytes, second.padded_bytes, second.in_hbm) == (8000, 40 * 128 * 2, True)
    assert (third.bytes, fourth.bytes) == (0, 1)


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}", (0, 2, 4, 6)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups(text: str, group: tuple[int, ...]):
    assert parse_groups(f"channel_id=1, {text}, dimensions={{0}}", 8) == group


def test_attributes_of_several_lines_end_no_computation():
    """As in programs with JAX's splash attention."""
    text = """ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %kernel = f32[8,128]{1,0} custom-call(%a), custom_call_target="k", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="kernel"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"7"}}}
  ROOT %b = f32[8,128]{1,0} copy(%kernel)
}
"""
    kernel, last = Program(text).computations["main"].instructions[1:]
    assert (kernel.op_name, last.name) == ("kernel", "b")
    assert kernel.backend_config["custom_call_config"]["cost_estimate"] == {"flops": "7"}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule m\n")
    with pytest.raises(ValueError, match="not an instruction"):
        parse_instruction("  %x = f32[4]")


def test_parts_of_a_collective_that_is_spread_over_fusions():
    """The form on v5e, shortened."""
    text = """HloModule m, is_scheduled=true, num_partitions=4

%begin (a: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %a = bf16[2,8]{1,0} parameter(0)
  %g = bf16[8,8]{1,0} all-gather(%a), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%go_on (b: bf16[2,8], m: bf16[8,8]) -> bf16[8,8] {
  %b = bf16[2,8]{1,0} parameter(0)
  %m = bf16[8,8]{1,0} parameter(1)
  %h = bf16[8,8]{1,0} all-gather(%b), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = bf16[8,8]{1,0} dot(%m, %m)
}

%end (e: bf16[2,8]) -> bf16[8,8] {
  %e = bf16[2,8]{1,0} parameter(0)
  %i = bf16[8,8]{1,0} all-gather(%e), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %f = bf16[8,8]{1,0} custom-call(%i), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[2,8], q: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %q = bf16[8,8]{1,0} parameter(1)
  %s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%p), kind=kCustom, calls=%begin
  %t = bf16[8,8]{1,0} fusion(%p, %q), calls=%go_on, backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %u = bf16[8,8]{1,0} fusion(%p), kind=kCustom, calls=%end
}
"""
    program = Program(text)
    s, t, u = program.computations["main"].instructions[2:]
    assert [program.fused_part(i) for i in (s, t, u)] == ["start", "step", "done"]
    assert [program.collective(i) is None for i in (s, t, u)] == [False, True, True]
    assert program.is_asynchronous(s) and program.is_matmul(t)
    assert {program.channel(i) for i in (s, t, u)} == {"9"}


def test_a_transfer_between_slices():
    attributes = (
        'channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name='
        '"xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.17_0"}'
    )  # fmt: skip
    send = parse_instruction(f"%send = (f32[16,8,128]{{2,1,0}}, u32[], token[]) send(%x, %y), {attributes}")
    collective = Program(PADDED).collective(send)
    assert collective is not None
    assert (collective.kind, collective.bytes, collective.channel) == ("between-slices", 65536, "all-reduce.17_0")
