"""Whole runs of fine-tuning, of all parameters and of adapters: resume, replay, answers, what is refused."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from bc2_jax.align import sft, tuning
from bc2_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    FineTuneConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    QuestionsConfig,
    SourceConfig,
)
from bc2_jax.convert.peft import load_peft
from bc2_jax.convert.pretrained import load_params, load_pretrained, save_params
from bc2_jax.evaluate.asking import ask, read_questions
from bc2_jax.evaluate.scorer import Scorer
from bc2_jax.metadata import read_metadata
from bc2_jax.model.baichuan import init_params
from bc2_jax.sharding import make_mesh
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.train import pretrain
from bc2_jax.train.loop import RunResult
from bc2_jax.train.metrics import read_metrics
from tests.evaluate.benchmark_files import write_ceval
from tests.packed_rows import pack_texts

replay = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "replay.py"))["main"]
QUESTIONS = [("Is it?", "yes"), ("What is a module of Python, in few words?", "a file")]
MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, position_embedding="alibi",
    vocab_size=640, z_loss_weight=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(modules, tokenizer, tmp_path_factory) -> FineTuneConfig:
    folder = tmp_path_factory.mktemp("sft")
    documents = [part for part in modules[0].split("\n\n") if part]
    pack_texts(documents, tokenizer, folder / "rows", 32, validation_fraction=0.02)
    save_params(init_params(MODEL, 1, make_mesh(MeshConfig())), MODEL, folder / "base", tokenizer.path)
    conversations = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations]
    (folder / "questions.jsonl").write_text("".join(lines))
    return FineTuneConfig(
        name="test", model=MODEL, init_from=str(folder / "base"),
        data=DataConfig(
            sources=(SourceConfig(path=str(folder / "rows")),), tokenizer=str(tokenizer.path), sequence_length=32,
            global_batch_size=8, accumulation_steps=2,
        ),
        compute=ComputeConfig(attention="reference", loss_chunk=32, remat="none"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, min_learning_rate=1e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(save_every=2, keep_last=9),
        questions=QuestionsConfig(path=str(folder / "questions.jsonl"), max_new_tokens=8, show=1),
        num_steps=4, eval_every=4, eval_batches=1, verify_resume_steps=2,
    )  # fmt: skip


def run(config: FineTuneConfig, folder: Path, **changes) -> RunResult:
    return sft.train(dataclasses.replace(config, workdir=str(folder / "run"), **changes))


@pytest.fixture(scope="module")
def full(config, tmp_path_factory) -> RunResult:
    return run(config, tmp_path_factory.mktemp("full"), neftune_alpha=5.0, loss_weighting="sample")


ADAPTERS = {"lora": LoraConfig(rank=2, targets=("q_proj", "v_proj", "down_proj"), dropout=0.2)}


frozen: list[dict] = []
"""The base model of the run of `adapted`."""


@pytest.fixture(scope="module")
def adapted(config, tmp_path_factory) -> RunResult:
    def load(*args):
        params, found = load_params(*args)
        frozen.append(params)
        return params, found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "load_params", load)
        folder = tmp_path_factory.mktemp("adapted")
        asked = EvaluateConfig(tasks=("ceval",), data_dir=str(write_ceval(folder)), limit=4, shots=0)
        return run(config, folder, export_hf=True, evaluate=asked, **ADAPTERS)


@pytest.mark.parametrize("name", ["full", "adapted"])
def test_steps_with_noise_are_identical_when_they_are_done_again(name: str, request, capsys):
    """The run itself has resumed at step 2 and compared the parameters (verify_resume_steps)."""
    result = request.getfixturevalue(name)
    assert replay([str(result.workdir), "--step", "4"]) == 0
    out = capsys.readouterr().out
    assert "identical" in out and "parameters sha256" in out


def test_answers_are_asked_before_and_after(full):
    metrics = [m for m in read_metrics(full.workdir / "metrics.jsonl") if "validation_answers_right" in m]
    assert [m["step"] for m in metrics] == [0, 4]
    for step in (0, 4):
        lines = [json.loads(line) for line in (full.workdir / "answers" / f"step_{step}.jsonl").open()]
        assert [line["messages"][-1]["content"] for line in lines] == [q for q, _ in QUESTIONS]
        assert all(line["tokens"] == 8 or line["ended"] for line in lines)
    assert (full.workdir / "answers.png").stat().st_size > 1000


def test_adapters_alone_are_trained_and_saved(config, full, adapted):
    def size(result):
        return sum(p.stat().st_size for p in (result.workdir / "checkpoints" / "4").rglob("*") if p.is_file())

    assert size(adapted) < size(full) / 3
    found = load_peft(adapted.workdir / "adapter", MODEL)
    assert found.config.rank == 2 and np.abs(found.params["layers"]["mlp"]["down_proj"]["lora_b"]).max() > 0
    first, *_, last = [m["loss"] for m in read_metrics(adapted.workdir / "metrics.jsonl") if "loss" in m]
    assert last < first
    mesh = make_mesh(MeshConfig(fsdp=8))  # another than the run's
    base = load_params(config.init_from, "bfloat16", mesh)[0]
    jax.tree.map(np.testing.assert_array_equal, frozen[0], base)
    with jax.set_mesh(mesh):
        again = tuning.checksum(base)
    assert read_metadata(adapted.workdir / "checkpoints" / "4")["base_checksum"] == f"{again:08x}"


def test_benchmarks_are_asked_of_the_model_with_its_adapters(adapted):
    """The merged model, which other code makes, gives what the run saw."""
    metrics = read_metrics(adapted.workdir / "metrics.jsonl")
    found = {m["step"]: m["validation_ceval_gold_nats"] for m in metrics if "validation_ceval_gold_nats" in m}
    assert set(found) == {0, 4} and found[0] != found[4]
    (asked,) = read_questions(["ceval"], adapted.workdir.parent, limit=4, shots=0)
    merged = load_pretrained(adapted.workdir / "hf", mesh=make_mesh(MeshConfig()))
    records = ask(asked.task, asked.examples, Scorer(merged, Tokenizer(adapted.workdir / "hf" / "tokenizer.model")))
    nats = -np.mean([record["log_probs"][record["gold"][0]] for record in records])
    assert found[4] == pytest.approx(nats, abs=0.05)  # the run computes in bf16


def test_the_merged_model_is_exported(config, adapted):
    """W + alpha / rank * A B in numpy, fp32 as the base is."""
    adapter, merged = load_peft(adapted.workdir / "adapter", MODEL), load_params(adapted.workdir / "hf")[0]
    arrays, base = adapter.params["layers"]["mlp"]["down_proj"], load_params(config.init_from)[0]
    change = 32 / 2 * np.einsum("lfr,lrd->lfd", arrays["lora_a"], arrays["lora_b"])
    down = [np.asarray(params["layers"]["mlp"]["down_proj"]["weight"]) for params in (base, merged)]
    assert np.abs(down[1] - down[0]).max() > 1e-3
    np.testing.assert_allclose(down[1], down[0] + change, atol=1e-6)
    np.testing.assert_array_equal(*(params["layers"]["mlp"]["up_proj"]["weight"] for params in (base, merged)))


def test_what_cannot_go_on_is_refused(config, full, adapted, tmp_path):
    again = dataclasses.replace(config, workdir=str(adapted.workdir), resume="auto", num_steps=6)
    with pytest.raises(ValueError, match="these fields differ: lora.rank: 3 is 2 in them"):
        sft.train(dataclasses.replace(again, lora=dataclasses.replace(ADAPTERS["lora"], rank=3)))
    params, found = load_params(config.init_from)
    params["norm"]["weight"] = params["norm"]["weight"].at[3].add(2**-6)
    save_params(params, MODEL, tmp_path / "other")
    with pytest.raises(ValueError, match="the adapters in .* were trained with other base parameters"):
        sft.train(dataclasses.replace(again, init_from=str(tmp_path / "other"), **ADAPTERS))
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(pretrain.TrainConfig)}
    other = pretrain.TrainConfig(**(fields | {"workdir": str(full.workdir), "resume": "auto", "num_steps": 6}))
    with pytest.raises(ValueError, match="its checkpoints are of a FineTuneConfig, this run is of a TrainConfig"):
        pretrain.train(other)
