"""What is tried and what is chosen."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

from bc2_jax.aot.search import BATCHES, POLICIES, Candidate, Result, candidates, choose, pareto
from bc2_jax.config import ComputeConfig, MeshConfig
from bc2_jax.tpu.chips import GIB, parse_topology

CONFIG = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "baichuan2_13b.py"))["config"]()


def result(hbm: float | None, mfu: float | None) -> Result:
    return Result(Candidate(1, "full", 1, 1), None if hbm is None else int(hbm * GIB), mfu, mfu)


def test_candidates_suit_the_model_and_the_topology():
    found = list(candidates(CONFIG, parse_topology("v5p:4x4x8")))
    assert {c.batch_per_chip for c in found} == set(BATCHES)
    assert {c.remat for c in found} == set(POLICIES)
    assert {(c.data, c.tensor) for c in found} == {(1, 1), (2, 1), (4, 1), (1, 2)}
    assert len(found) == len(set(found))
    # 5120 is not a multiple of 4096 chips: only meshes with fewer parameter shards remain.
    few = {(c.data, c.tensor) for c in candidates(CONFIG, parse_topology("v5p:16x16x16"))}
    assert few == {(4, 1)}


def test_slices_hold_replicas():
    assert {c.data for c in candidates(CONFIG, parse_topology("v5p:4x4x8", 2))} == {2, 4, 8}


def test_pareto_and_choice():
    results = [
        result(90.5, 0.9),
        result(30, 0.6),
        result(20, 0.5),
        result(25, 0.4),
        result(None, None),
        result(20, 0.3),
    ]
    assert [r.mfu for r in pareto(results)] == [0.5, 0.6, 0.9]
    chosen = choose(results, 95 * GIB)
    assert chosen is not None and chosen.mfu == 0.6  # 90.5 GiB leave too little room
    assert choose(results, 16 * GIB) is None


def test_the_line_to_paste_is_python_and_keeps_what_the_config_says():
    config = dataclasses.replace(CONFIG, compute=ComputeConfig(loss_chunk=2048))
    line = Candidate(2, "save_dots", 4, 1).config_line(config, 128)
    code, comment = line.split("  # ")
    assert comment == "data.global_batch_size = 256"
    names = {"ComputeConfig": ComputeConfig, "MeshConfig": MeshConfig}
    assert eval(f"dict({code})", names) == {
        "compute": ComputeConfig(remat="save_dots", loss_chunk=2048),
        "mesh": MeshConfig(data=4),
    }
