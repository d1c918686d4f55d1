"""What is asked for, and the arithmetic and words of the report, on made-up figures."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bc2_jax.aot.compilation import Memory
from bc2_jax.aot.estimate import HBM_SHARE, Estimate, Traffic
from bc2_jax.aot.inference import InferenceReport, ProgramReport, Request, copy_warnings, render, whole_slice_mesh
from bc2_jax.aot.program import Program
from bc2_jax.aot.search import HBM_LIMIT
from bc2_jax.config import BAICHUAN2_13B, MeshConfig
from bc2_jax.tpu.chips import GIB, parse_topology

MESH = MeshConfig(data=1, fsdp=1, tensor=8)


def program(seconds: float, temporaries: int) -> ProgramReport:
    estimate = Estimate(
        matmul=seconds / 2, vector=seconds / 4, kernels=seconds / 8, exposed=seconds / 8, hidden=0.0,
        matmul_raw=seconds, vector_raw=seconds / 4, collectives={"all-reduce": Traffic(2**20, 80, seconds=1e-4)},
        warnings=(),
    )  # fmt: skip
    memory = Memory(
        arguments=4 * GIB, outputs=2 * GIB, aliased=2 * GIB, temporaries=temporaries, peak=7 * GIB, laid_out=8 * GIB
    )
    return ProgramReport(memory, 16 * GIB, 0.5, 10.0, estimate, ("a line",))


REPORT = InferenceReport(
    topology="v5e:2x4", chips=8, mesh=MESH, request=Request(batch=4, prompt_length=512, cache_length=1024),
    parameter_bytes=3 * GIB, read_bytes=2 * GIB, cache_bytes=1 * GIB, hbm_bandwidth=800e9,
    prefill=program(0.2, GIB), decode=program(0.008, 0),
)  # fmt: skip


def test_figures():
    assert REPORT.prefill_tokens_per_second == 4 * 512 / 0.2
    assert REPORT.floor_seconds == 3 * GIB / (HBM_SHARE * 800e9)
    # A sequence takes a quarter of the cache and of the prefill's temporaries.
    assert REPORT.largest_batch == int((HBM_LIMIT * 16 - 3) / 0.5)
    halves = dataclasses.replace(REPORT, mesh=MeshConfig(data=5, fsdp=1, tensor=8))
    assert halves.largest_batch % 5 == 0 and REPORT.largest_batch - halves.largest_batch < 5
    assert REPORT.warnings == ["prefill: a line", "decoding: a line"]


def test_json():
    values = json.loads(json.dumps(REPORT.as_json()))
    assert values["decode"]["estimated_tokens_per_second_per_sequence"] == pytest.approx(1 / 0.008)
    assert values["decode"]["estimated_tokens_per_second"] == pytest.approx(4 / 0.008)
    assert values["decode"]["estimated_seconds_at_worst"] == pytest.approx(0.008 * 1.5)
    assert values["prefill"]["hbm_bytes_per_chip"] == 5 * GIB
    assert values["mesh"]["tensor"] == 8 and values["cache_length"] == 1024


def test_every_time_is_called_estimated_and_the_batch_arithmetic():
    rows = dict(render(REPORT))
    assert {"prefill: estimated time", "decoding step: estimated time", "decoding: estimated tokens/s"} <= set(rows)
    assert "by arithmetic" in rows["largest batch"] and "not compiled" in rows["largest batch"]
    assert "125 a sequence, 500 in all (at worst 83, 333)" in rows["decoding: estimated tokens/s"]
    assert rows["decoding step: floor"].startswith("4.74 ms for 2.00 GiB of parameters and 1.00 GiB")


def test_the_whole_slice_shares_each_layer():
    assert whole_slice_mesh(parse_topology("v5e:2x4")) == MESH
    assert whole_slice_mesh(parse_topology("v6e:2x2", 2)) == MeshConfig(data=2, fsdp=1, tensor=4)


@pytest.mark.parametrize(
    ("request_", "mesh", "message"),
    [
        (Request(batch=0), MESH, "batch = 0 is not valid: it must be a positive multiple of"),
        (Request(batch=3), MeshConfig(data=2, fsdp=1, tensor=4), r"batch = 3 .* mesh.data = 2"),
        (Request(prompt_length=1000), MESH, "prompt_length = 1000 .* it must be 64, 128 or a multiple of 256"),
        (Request(cache_length=0), MESH, "cache_length = 0 is not valid"),
        (Request(prompt_length=4096), MESH, "cache_length = 4096 .* more than prompt_length = 4096 and at most 4096"),
        (Request(cache_length=8192), MESH, "cache_length = 8192 .* at most 4096, what model.model_max_length = 4096"),
    ],
)  # fmt: skip
def test_a_request_that_generate_would_not_compile(request_: Request, mesh: MeshConfig, message: str):
    with pytest.raises(ValueError, match=message):
        request_.check(BAICHUAN2_13B, mesh)


def test_large_copies_are_named():
    text = """HloModule m, is_scheduled=true

ENTRY %main (p: bf16[40,8,5,4096,128]) -> bf16[40,8,5,4096,128] {
  %p = bf16[40,8,5,4096,128]{4,3,2,1,0} parameter(0)
  ROOT %c = bf16[40,8,5,4096,128]{4,1,3,2,0} copy(%p)
}
"""
    assert copy_warnings(Program(text)) == ["bf16[40,8,5,4096,128], 1.56 GiB, is copied 1 times."]
