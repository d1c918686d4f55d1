"""Figures, warnings and JSON of a compiled step that is made up from the excerpt."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import jax
import pytest

from bc2_jax.align import tuning
from bc2_jax.aot.compilation import CompiledStep, Memory
from bc2_jax.aot.report import make_report, render
from bc2_jax.config import (
    DataConfig,
    FineTuneConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    SourceConfig,
    TrainConfig,
)
from bc2_jax.model.lora import abstract_adapter
from bc2_jax.tpu.chips import parse_topology
from bc2_jax.tpu.rates import default_rates

CONFIG = TrainConfig(
    name="tiny",
    model=ModelConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, position_embedding="alibi",
        vocab_size=256, model_max_length=128,
    ),
    data=DataConfig(
        sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=128, global_batch_size=8
    ),
    mesh=MeshConfig(fsdp=4),
    num_steps=10,
)  # fmt: skip
STEP = CompiledStep(
    topology=parse_topology("v5p:2x2x1"),
    config=CONFIG,
    sequences=8,
    length=128,
    memory=Memory(arguments=4000, outputs=3900, aliased=3800, temporaries=10_000, peak=12_000, laid_out=12_500),
    hlo=(Path(__file__).parent / "data" / "scan_v5p_2x2x1.txt").read_text(),
    log="W spmd: Involuntary full rematerialization. The compiler cannot go from ...",
    coordinates=tuple((0, *place) for place in itertools.product(range(2), range(2), range(1))),
    replicated=(("params.norm", 2**21),),
    flops=8 * CONFIG.model.flops_per_sequence(128),
    lower_seconds=0.5,
    compile_seconds=40.0,
)


def test_figures():
    report = make_report(STEP)
    assert (report.chips, report.sequences_per_chip, report.tokens) == (4, 2, 256)
    assert report.memory.total == 4000 + 3900 - 3800 + 10_000
    assert report.flops == 2 * CONFIG.model.flops_per_sequence(128)
    assert report.mfu == report.flops / report.estimate.seconds / 459e12
    assert report.mfu_low < report.mfu
    assert report.days == pytest.approx(2.6e12 / (4 * 256 / report.estimate.seconds) / 86400)


FINE_TUNING = FineTuneConfig(**{f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)})


def test_the_formula_gives_the_figure():
    """Of training all parameters, and of adapters beside frozen ones."""
    adapters = dataclasses.replace(FINE_TUNING, lora=LoraConfig(rank=4))
    flops = tuning.adapter_flops(adapters)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_adapter(adapters.lora, CONFIG.model, None)))
    for step in (STEP, dataclasses.replace(STEP, config=adapters, flops=flops, adapter_parameters=count)):
        report = make_report(step)
        formula = report.flops_formula
        for word in (" frozen", " adapter", " matmul", " parameters", " layers", " sequences", ","):
            formula = formula.replace(word, "")
        assert eval(formula.replace("x", "*")) == report.flops
    assert report.flops < make_report(STEP).flops
    # Gradients are those of the adapters alone.
    assert report.audit.reduced_needed == 2 * count < report.audit.gathered_needed


def test_the_papers_tokens_are_for_pretraining():
    names = [dict(render(make_report(dataclasses.replace(STEP, config=c)))) for c in (CONFIG, FINE_TUNING)]
    assert ["estimated days for 2.6 T tokens" in lines for lines in names] == [True, False]


def test_json():
    values = json.loads(json.dumps(make_report(STEP).as_json()))
    assert {
        "hbm_bytes_per_chip", "compile_seconds", "model_flops_per_chip", "estimated_step_seconds", "estimated_mfu",
        "estimated_mfu_low", "tokens_per_second_per_chip", "collectives", "audit", "warnings",
    } <= set(values)  # fmt: skip
    assert values["collectives"]["reduce-scatter"]["asynchronous"] is True
    assert values["collectives"]["all-gather"] | {"seconds": 0} == {
        "bytes": 5 * 2**19, "count": 5, "asynchronous_bytes": 0, "gather_bytes": 0, "seconds": 0, "asynchronous": False,
    }  # fmt: skip
    parts = values["estimated_step_parts"]
    assert sum(parts[name] for name in ("matmul", "vector", "kernels", "exposed")) == pytest.approx(
        values["estimated_step_seconds"]
    )


def test_warnings():
    warnings = " ".join(make_report(STEP).warnings)
    assert "Every device holds the whole of params.norm, 2 MiB." in warnings
    several = dataclasses.replace(STEP, replicated=(("params.a", 2**20), ("params.b", 2**21)))
    said = "Every device holds the whole of params.b, 2 MiB, and of 1 more arrays, 3 MiB in all."
    assert said in make_report(several).warnings
    assert "1 tensors are gathered whole to change their layout" in warnings
    # Less gathered than the parameters need: the count is not complete.
    large = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, hidden_size=4096))
    assert "The count is not complete" in " ".join(
        make_report(dataclasses.replace(STEP, config=large)).warnings
    )  # fmt: skip


def test_host_memory_is_named_and_no_peak_beside_it():
    memory = dataclasses.replace(STEP.memory, host=2**31)
    text = dict(render(make_report(dataclasses.replace(STEP, memory=memory))))["HBM per chip"]
    assert "in host memory 2.00 GiB" in text and "in use" not in text
    assert "in use at one time 1 MiB" in dict(render(make_report(STEP)))["HBM per chip"]


def test_every_time_is_called_estimated():
    names = [name for name, _ in render(make_report(STEP))]
    assert {"estimated step time", "estimated MFU", "estimated tokens/s per chip"} <= set(names)


def test_measured_rates_are_named():
    default = default_rates(STEP.topology.chip)
    assert make_report(STEP).program.rates == default and "rates" not in dict(render(make_report(STEP)))
    rates = dataclasses.replace(
        default, matmul_share=0.9, host_bandwidth=12e9, measured=("matmul_share", "host_bandwidth")
    )
    report = make_report(STEP, rates)
    said = "measured: matmul_share 0.9, host_bandwidth 12 GB/s; the other 5 by default"
    assert dict(render(report))["rates"] == said
    assert json.loads(json.dumps(report.as_json()))["rates"]["measured"] == ["matmul_share", "host_bandwidth"]
