"""MaxText beside ours: the same batch, and a row of figures that are given."""

from __future__ import annotations

import pytest

from bc2_jax.aot.tables import TABLES
from benchmarks import peers

FIGURES = {"hbm_bytes_per_chip": 2**33, "estimated_step_seconds": 2.0, "estimated_step_seconds_at_worst": 3.0}


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v5e:16x16", "v6e:16x16"])
def test_our_step_is_the_preset_with_the_vocabulary_of_the_shape(topology):
    arguments, sequences = peers.our_arguments(topology, 32_000)
    assert "configs/baichuan2_7b.py" in arguments and f"--topology {topology} " in arguments
    assert arguments.endswith("--model.vocab-size 32000") and 1 <= sequences <= 4


def test_a_row():
    peer = FIGURES | {"matmul": 1.0, "vector": 0.5, "kernels": 0.25, "exposed": 0.25, "estimated_step_seconds": 3.0}
    row = peers.row("v5p:4x4x4", "llama2-7b", "theirs", 2, peer, FIGURES | {"estimated_mfu": 0.5})
    assert row["figures"]["step_ratio"] == 1.5 and row["figures"]["hbm_ratio"] == 1
    headers, columns = TABLES["peers"]
    assert len(row["cells"]) == len(headers)
    assert row["figures"]["peer"].keys() >= {"matmul", "vector", "kernels", "exposed"} and columns
