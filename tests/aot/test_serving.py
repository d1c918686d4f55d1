"""What is asked for, the search for the most slots, and the arithmetic and words of the report, on made-up figures."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from bc2_jax.aot.compilation import DoesNotFit, Memory
from bc2_jax.aot.estimate import Estimate, Traffic
from bc2_jax.aot.report import ProgramReport
from bc2_jax.aot.serving import CompiledServing, ServingReport, ServingShapes, most_slots, render
from bc2_jax.config import BAICHUAN2_13B, MeshConfig
from bc2_jax.tpu.chips import CHIPS, GIB, parse_topology
from bc2_jax.tpu.rates import default_rates

MESH = MeshConfig(data=1, fsdp=1, tensor=8)


def program(seconds: float) -> ProgramReport:
    estimate = Estimate(
        matmul=seconds / 4, vector=seconds / 8, kernels=seconds / 2, exposed=seconds / 8, hidden=0.0,
        matmul_raw=seconds / 2, vector_raw=seconds / 8, collectives={"all-reduce": Traffic(2**20, 80, seconds=1e-4)},
        warnings=(),
    )  # fmt: skip
    memory = Memory(arguments=4 * GIB, outputs=2 * GIB, aliased=2 * GIB, temporaries=GIB, peak=7 * GIB, laid_out=GIB)
    return ProgramReport(memory, 16 * GIB, 0.5, 10.0, default_rates(CHIPS["v5e"]), estimate, ("a line",))


TOPOLOGY = parse_topology("v5e:2x4")
COMPILED = CompiledServing(
    dataclasses.replace(TOPOLOGY, chip=dataclasses.replace(TOPOLOGY.chip, hbm_bandwidth=800e9)),
    SimpleNamespace(mesh=MESH), ServingShapes(slot_length=2048, prompt_length=600), slots=32,
    engine=SimpleNamespace(chunk_length=256, cache_bytes=8 * GIB, state_bytes=9 * GIB), coordinates=(),
    parameter_bytes=3 * GIB, read_bytes=2 * GIB,
)  # fmt: skip
REPORT = ServingReport(
    COMPILED, extend=program(0.016), key_seconds=1e-5, decode=program(0.02), rare_seconds=0.002
)  # fmt: skip


def changed(**changes) -> ServingReport:
    return dataclasses.replace(REPORT, compiled=dataclasses.replace(COMPILED, **changes))


def test_a_prompt_runs_chunk_by_chunk():
    """Chunks of 256 attend to 256, 512 and 768 keys."""
    assert [REPORT.chunk_seconds(i) for i in range(3)] == pytest.approx([0.01856, 0.02112, 0.02368])
    assert REPORT.first_token_seconds == pytest.approx(0.06336)
    one = changed(shapes=ServingShapes(prompt_length=256))
    assert one.first_token_seconds == pytest.approx(0.01856)


def test_roofline_of_all_and_of_one():
    assert REPORT.floor_seconds == 10 * GIB / (0.85 * 800e9)
    assert REPORT.single_floor_seconds == 2.25 * GIB / (0.85 * 800e9)
    # The kernel's half of the step reads one of 32 caches.
    assert REPORT.single_seconds == pytest.approx(0.01 + 0.01 / 32)
    # With two parts of the mesh, one sequence takes as long as one in each.
    two = changed(config=SimpleNamespace(mesh=MeshConfig(data=2, fsdp=1, tensor=4)))
    assert two.single_seconds == pytest.approx(0.01 + 0.01 / 16)
    assert REPORT.warnings == ["chunk of a prompt: a line", "decoding: a line"]


def test_json():
    values = json.loads(json.dumps(REPORT.as_json()))
    assert values["decode"]["estimated_tokens_per_second"] == pytest.approx(32 / 0.02)
    assert values["decode"]["estimated_tokens_per_second_at_worst"] == pytest.approx(32 / 0.025)
    assert values["decode"]["floor_share"] == pytest.approx(REPORT.floor_seconds / 0.02)
    assert values["extend"]["hbm_bytes_per_chip"] == 5 * GIB
    assert values["mesh"]["tensor"] == 8 and values["slots"] == 32 and values["slot_length"] == 2048


def test_every_time_is_called_estimated():
    rows = dict(render(REPORT))
    assert [name for name in rows if "time" in name or "tokens/s" in name] == [
        "chunk of a prompt: estimated time", "estimated time to first token", "decoding step: estimated time",
        "decoding: estimated tokens/s", "one sequence: estimated tokens/s",
    ]  # fmt: skip
    assert rows["slots"] == "32 of 2048 tokens, the most that fit 95% of HBM, compiled"
    assert (
        "1,600 in all (at worst 1,280), all slots full, 79% of what HBM gives" in rows["decoding: estimated tokens/s"]
    )
    assert rows["estimated time to first token"].startswith("63.36 ms for a prompt of 600, 3 chunks of 256")
    given = changed(shapes=ServingShapes(slots=32))
    assert dict(render(given))["slots"] == "32 of 4096 tokens, given"


@pytest.mark.parametrize(
    ("temporaries", "limit", "expected"),
    [
        (lambda slots: 5, 100, 64),
        (lambda slots: 0, 100, 72),
        (lambda slots: 20 if slots > 40 else 0, 100, 56),
        (lambda slots: slots, 100, 40),
    ],
)  # fmt: skip
def test_the_most_slots(temporaries, limit: int, expected: int):
    """8 slots take 10 bytes beside 6 of parameters; what is found fits, and 8 more would not."""
    tried = []

    def compile_slots(slots: int) -> SimpleNamespace:
        tried.append(slots)
        needed = 6 + slots // 8 * 10 + temporaries(slots)
        if needed > 110:
            raise DoesNotFit("too large", needed)
        return SimpleNamespace(slots=slots, memory=SimpleNamespace(laid_out=needed))

    slots, compiled = most_slots(compile_slots, limit, held=6, step=8, a_step=10)
    assert compiled.slots == slots
    assert 6 + slots // 8 * 10 + temporaries(slots) <= limit
    assert slots == expected and len(tried) <= 4


def test_not_even_the_fewest_slots_fit():
    def compile_slots(slots: int):
        raise DoesNotFit("too large", None)

    with pytest.raises(DoesNotFit, match="Not even 8 slots fit a device"):
        most_slots(compile_slots, 100, held=90, step=8, a_step=10)


@pytest.mark.parametrize(
    ("shapes", "mesh", "message"),
    [
        (ServingShapes(slots=0), MESH, "slots = 0 is not valid: it must be a positive multiple of"),
        (ServingShapes(slots=3), MeshConfig(data=2, fsdp=1, tensor=4), r"slots = 3 .* mesh.data = 2"),
        (ServingShapes(slot_length=1000), MESH, "slot_length = 1000 .* it must be a multiple of 256, at most 4096"),
        (ServingShapes(slot_length=8192), MESH, "at most 4096, what model.model_max_length = 4096 takes"),
        (ServingShapes(prompt_length=4096), MESH, r"prompt_length = 4096 .* it must be in 1\.\.4095"),
        (ServingShapes(prompt_length=0), MESH, "prompt_length = 0 is not valid"),
    ],
)  # fmt: skip
def test_what_a_server_cannot_have(shapes: ServingShapes, mesh: MeshConfig, message: str):
    with pytest.raises(ValueError, match=message):
        shapes.check(BAICHUAN2_13B, mesh)
