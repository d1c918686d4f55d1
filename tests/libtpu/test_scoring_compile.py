"""The scoring program through the real TPU compiler; needs the tpu extra and no TPU."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bc2_jax.aot import compilation, scoring
from bc2_jax.config import MeshConfig
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.options import compiler_options
from tests.libtpu.test_serving_compile import CONFIG, TOPOLOGY

compilation.use_topologies()


def test_a_batch_is_scored_without_the_logits_of_all_tokens():
    shapes = scoring.ScoringShapes(rows=2, row_length=1024, places=128)
    compiled = scoring.compile_scoring(CONFIG, TOPOLOGY, shapes, compiler_options("v5e", inference=True))
    report = scoring.make_report(compiled)
    assert report.program.memory.temporaries < 64 * 2**20
    assert f"[2,1024,{CONFIG.model.vocab_size // 8}]" not in compiled.program.hlo
    assert report.parameter_bytes < report.program.memory.total
    assert report.total_seconds == pytest.approx(sum(b.rows(1024) for b in report.benchmarks) * report.row_seconds)
    assert json.loads(json.dumps(report.as_json()))["estimated_seconds"] == report.total_seconds
    assert [name for name, _ in scoring.render(report)][-1] == "all: estimated time"


def test_rows_that_the_mesh_does_not_cut_are_refused():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=1, tensor=4))
    with pytest.raises(ValueError, match="3 rows .* multiple of 2"):
        scoring.compile_scoring(config, parse_topology("v5e:2x4"), scoring.ScoringShapes(rows=3), {})
