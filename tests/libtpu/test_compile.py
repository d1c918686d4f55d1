"""Compiles for real topologies; needs the tpu extra and no TPU: pytest tests/libtpu."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bc2_jax.aot import compilation, report
from bc2_jax.config import DataConfig, FineTuneConfig, LoraConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.tpu.chips import CHIPS, parse_topology
from bc2_jax.tpu.options import compiler_options

compilation.use_topologies()

ROOT = Path(__file__).parents[2]
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
TINY = TrainConfig(
    name="tiny",
    model=ModelConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, position_embedding="alibi",
        vocab_size=1024, model_max_length=512,
    ),
    data=DataConfig(
        sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=512, global_batch_size=8
    ),
    num_steps=10,
)  # fmt: skip


@pytest.mark.parametrize("generation", CHIPS)
def test_the_step_compiles_with_the_options_of_every_generation(generation: str):
    topology = parse_topology(SMALLEST[generation])
    result = report.make_report(compilation.compile_step(TINY, topology, compiler_options(generation)))
    assert result.chips == 4
    assert 0 < result.memory.total < 2**30
    assert 0 < result.mfu_low <= result.mfu < 1
    assert result.estimate.matmul > 0
    assert result.audit.complete, result.audit
    assert result.estimate.collectives["all-gather"].bytes > 0


def test_state_and_batch_take_what_they_must():
    topology = parse_topology("v5p:2x2x1")
    step = compilation.compile_step(TINY, topology, {})
    # Three fp32 copies of the parameters on 4 chips, and the batch; norms are whole everywhere.
    assert step.memory.arguments == pytest.approx(3 * 4 * TINY.model.num_parameters() / 4, rel=0.05)
    assert step.memory.aliased > 0.95 * 3 * TINY.model.num_parameters()
    assert len(step.coordinates) == 4
    assert step.replicated == ()


def test_frozen_parameters_take_what_they_must_and_are_not_donated():
    """Adapters: the base in bf16 and only theirs in fp32, three times."""
    fields = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    config = FineTuneConfig(**fields, lora=LoraConfig(rank=16, dropout=0.1), neftune_alpha=5.0)
    step = compilation.compile_step(config, parse_topology("v5p:2x2x1"), compiler_options("v5p"))
    state = 3 * 4 * step.adapter_parameters / 4
    assert 0 < step.adapter_parameters < TINY.model.num_parameters() / 4
    # A TPU pads the rank to its 128 lanes. What is not donated is the base and the batch.
    assert state <= step.memory.aliased < 128 / 16 * state
    kept = step.memory.arguments - step.memory.aliased
    assert kept == pytest.approx(2 * TINY.model.num_parameters() / 4, rel=0.1)
    result = report.make_report(step)
    assert result.audit.complete, result.audit
    assert 0 < result.mfu < 1 and result.flops == step.flops / 4


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="does not know an option"):
        compilation.compile_step(TINY, parse_topology("v5p:2x2x1"), {"xla_tpu_scoped_vmem_limit": 1})


def test_what_does_not_fit_says_so():
    model = dataclasses.replace(TINY.model, hidden_size=8192, intermediate_size=32768, num_hidden_layers=4)
    with pytest.raises(compilation.DoesNotFit, match=r"needs 2[0-9.]+ GiB beside its state, .* 15.75 GiB"):
        compilation.compile_step(
            dataclasses.replace(TINY, model=model), parse_topology("v5e:2x2"), compiler_options("v5e")
        )  # fmt: skip


def test_the_tool(tmp_path: Path):
    config = tmp_path / "tiny.py"
    config.write_text(
        '"""Tiny."""\nfrom bc2_jax.config import *\ndef config():\n'
        "    return TrainConfig(name='tiny', num_steps=1, model=ModelConfig(hidden_size=256, intermediate_size=512,\n"
        "        num_hidden_layers=2, num_attention_heads=2, position_embedding='rope', vocab_size=1024),\n"
        "        data=DataConfig(sources=(SourceConfig(path='rows'),), tokenizer='t', sequence_length=512))\n"
    )
    command = [
        sys.executable, "tools/aot_compile.py", str(config), "--topology", "v5p:2x2x1", "--batch-per-chip", "2",
        "--json", str(tmp_path / "out.json"), "--hlo", str(tmp_path / "out.txt"), "--compute.remat", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "compile-time estimate" in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["sequences_per_chip"] == 2
    assert "is_scheduled=true" in (tmp_path / "out.txt").read_text()[:2000]


def test_the_tool_refuses_what_cannot_be_booked():
    command = [sys.executable, "tools/aot_compile.py", "configs/baichuan2_7b.py", "--topology", "v5e:16x32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: topology = 'v5e:16x32' is not valid: no v5e slice has this shape; legal are")
