"""The arithmetic and words of a rollout's report, on made-up figures."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from bc2_jax.aot.compilation import Memory
from bc2_jax.aot.estimate import Estimate
from bc2_jax.aot.report import ProgramReport
from bc2_jax.aot.rollout import CompiledRollout, RolloutParts, RolloutReport, render
from bc2_jax.infer.refill import RolloutShapes
from bc2_jax.infer.settings import Settings
from bc2_jax.tpu.chips import CHIPS, GIB, parse_topology
from bc2_jax.tpu.rates import default_rates


def program(seconds: float, arguments: int, temporaries: int) -> ProgramReport:
    estimate = Estimate(seconds, 0.0, 0.0, 0.0, 0.0, seconds, 0.0, collectives={}, warnings=("slow",))
    memory = Memory(
        arguments * GIB, GIB, GIB, temporaries * GIB, peak=9 * GIB, laid_out=(arguments + temporaries) * GIB
    )
    return ProgramReport(memory, 95 * GIB, 0.5, 10.0, default_rates(CHIPS["v5p"]), estimate, ("a line",))


COMPILED = CompiledRollout(
    topology=parse_topology("v5p:2x2x1"),
    parts=RolloutParts(
        prepared=None, shapes=RolloutShapes(rows=64, prefill_rows=16, slots=1024), prompt_tokens=500,
        settings=Settings(max_new_tokens=501), answers=100, held={},
    ),
    engine=SimpleNamespace(chunk_length=256, cache_bytes=5 * GIB), coordinates=(),
    held={"actor's parameters": 4 * GIB, "optimizer": 8 * GIB, "reference": 2 * GIB}, update_holds=12 * GIB,
    prepared_bytes=3 * GIB,
)  # fmt: skip
REPORT = RolloutReport(COMPILED, extend=program(0.5, 8, 2), decode=program(0.01, 8, 1))


def test_peaks():
    """14 GiB are held. The decoding loop takes 9 GiB beside them, a chunk of prompts 10 GiB."""
    assert REPORT.rollout_bytes == (14 + 10) * GIB
    larger = dataclasses.replace(REPORT, decode=program(0.01, 8, 6))
    assert larger.rollout_bytes == (14 + 14) * GIB
    # Of what is held, 12 GiB are arguments of the update.
    assert REPORT.update_bytes(30 * GIB) == 32 * GIB


def test_time_is_that_of_the_longest_answers():
    """100 answers over 64 rows are two rounds of 500 steps after the first token; 7 groups of prompts in 2 chunks."""
    assert REPORT.seconds == pytest.approx(2 * 500 * 0.01 + 7 * 2 * 0.5)


def test_json_and_words():
    values = json.loads(json.dumps(REPORT.as_json(30 * GIB)))
    assert values["rollout_peak_bytes_per_chip"] == 24 * GIB and values["update_peak_bytes_per_chip"] == 32 * GIB
    assert values["rows"] == 64 and values["held_bytes_per_chip"]["reference"] == 2 * GIB
    rows = dict(render(REPORT, 30 * GIB))
    assert rows["HBM per chip, rollout"] == "24.00 GiB = 25% of 95.00 GiB"
    assert rows["HBM per chip, update"] == "32.00 GiB = 34% of 95.00 GiB"
    assert rows["held through an iteration"].startswith("14.00 GiB per chip: actor's parameters 4.00 GiB, ")
    assert "prepared actor 3.00 GiB, cache 5.00 GiB" in rows["held during the rollout"]
    assert all("estimated" in name for name in rows if "time" in name)
    assert REPORT.warnings == ["chunk of prompts: a line", "decoding: a line"]
