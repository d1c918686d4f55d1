"""MaxText beside ours: the same batch, and a row of figures that are given."""

from __future__ import annotations

import pytest

from bc2_jax.aot.program import Program
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


@pytest.mark.parametrize(("batch", "sequences"), [("", 1), ("2,", 2)])
def test_splash_attention_gets_the_flops_of_the_blocks_it_visits(batch, sequences):
    """MaxText's kernel has no batch dimension for one sequence."""
    text = (
        "HloModule step, entry_computation_layout={()->()}, num_partitions=1\n\n"
        "ENTRY %main () -> bf16[] {\n"
        "  %splash_mha_fwd_segmented.1 = (f32[" + batch + "512,128]{1,0}, bf16[" + batch + "32,4096,128]{2,1,0}, "
        "f32[" + batch + '32,4096,128]{2,1,0}) custom-call(), custom_call_target="tpu_custom_call"\n}\n'
    )
    program = Program(text)
    peers.declare_attention(program)
    (kernel,) = program.computations["main"].instructions
    # Two matmuls of heads of 128; of 8 x 8 blocks of 512 tokens the 36 on and below the diagonal.
    flops = sequences * 32 * 2 * 2 * 36 * 512 * 512 * 128
    assert kernel.backend_config["custom_call_config"]["cost_estimate"]["flops"] == flops
