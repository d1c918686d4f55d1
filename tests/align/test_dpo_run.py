"""Whole runs of preference tuning, of all parameters and of adapters: the reference kept, resume, replay, refusals."""

from __future__ import annotations

import dataclasses
import json
import logging
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.align import dpo, reference
from bc2_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    DPOConfig,
    DPOOptions,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    QuestionsConfig,
    SourceConfig,
)
from bc2_jax.convert.peft import load_peft
from bc2_jax.convert.pretrained import load_params, save_params
from bc2_jax.data.row_values import RowValues
from bc2_jax.model.baichuan import init_params
from bc2_jax.sharding import make_mesh
from bc2_jax.train import distributed
from bc2_jax.train.loop import RunResult
from bc2_jax.train.metrics import read_metrics

replay = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "replay.py"))["main"]
MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, position_embedding="alibi",
    vocab_size=640,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tokenizer, tmp_path_factory) -> DPOConfig:
    """40 pairs whose chosen answer is "yes" to questions of several lengths."""
    folder = tmp_path_factory.mktemp("dpo")
    save_params(init_params(MODEL, 1, make_mesh(MeshConfig())), MODEL, folder / "base", tokenizer.path)
    records = [
        {
            "prompt": f"Is {i} a number" + "?" * (i % 5), "chosen": "yes" + "!" * (i % 3),
            "rejected": "no, never" * (1 + i % 2),
        }
        for i in range(40)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    question = [{"role": "user", "content": "Is 7 a number?"}, {"role": "assistant", "content": "yes"}]
    (folder / "questions.jsonl").write_text(json.dumps({"messages": question}) + "\n")
    config = DPOConfig(
        name="test", model=MODEL, init_from=str(folder / "base"),
        data=DataConfig(
            sources=(SourceConfig(path=str(folder / "pairs.jsonl")),), tokenizer=str(tokenizer.path),
            sequence_length=64, global_batch_size=8, accumulation_steps=2,
        ),
        compute=ComputeConfig(attention="reference", loss_chunk=64, remat="none"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, min_learning_rate=1e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(save_every=2, keep_last=9),
        questions=QuestionsConfig(path=None),
        dpo=DPOOptions(reference_cache=str(folder / "cache"), sft_weight=0.1),
        num_steps=4, eval_every=4, verify_resume_steps=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "packed"))
        return dpo.complete(config)


def run(config: DPOConfig, folder: Path, **changes) -> RunResult:
    return dpo.train(dataclasses.replace(config, workdir=str(folder / "run"), **changes))


@pytest.fixture(scope="module")
def full(config, tmp_path_factory) -> RunResult:
    questions = QuestionsConfig(path=str(Path(config.init_from).with_name("questions.jsonl")), max_new_tokens=4)
    return run(config, tmp_path_factory.mktemp("full"), export_hf=True, questions=questions)


@pytest.fixture(scope="module")
def adapted(config, tmp_path_factory) -> RunResult:
    lora = LoraConfig(rank=2, targets=("q_proj", "v_proj", "down_proj"), dora=True)
    return run(config, tmp_path_factory.mktemp("adapted"), lora=lora)


@pytest.mark.parametrize("name", ["full", "adapted"])
def test_a_run_prefers_what_it_is_shown_and_is_exact(name, request, capsys):
    """It has resumed at step 2 and compared the parameters (verify_resume_steps); step 4 is done again here."""
    result = request.getfixturevalue(name)
    metrics = read_metrics(result.workdir / "metrics.jsonl")
    before, after = (m for m in metrics if "validation_accuracy" in m)
    assert (before["step"], after["step"]) == (0, 4)
    assert before["validation_reference_distance"] < 1e-2 and before["validation_pairs"] > 0
    assert abs(before["validation_preference_loss"] - np.log(2)) < 1e-2
    assert after["validation_preference_loss"] < np.log(2) - 0.05 and after["validation_accuracy"] > 0.9
    assert after["validation_chosen_reward"] > after["validation_rejected_reward"]
    assert (result.workdir / "loss.png").stat().st_size > 1000
    assert replay([str(result.workdir), "--step", "4"]) == 0
    assert "identical" in capsys.readouterr().out


def test_what_is_trained_is_exported(config, full, adapted):
    params, _ = load_params(full.workdir / "hf")
    base, _ = load_params(config.init_from)
    assert np.abs(np.asarray(params["norm"]["weight"]) - np.asarray(base["norm"]["weight"])).max() > 1e-3
    assert (
        np.abs(load_peft(adapted.workdir / "adapter", MODEL).params["layers"]["mlp"]["down_proj"]["lora_b"]).max() > 0
    )


def test_the_reference_is_computed_once(config, full, adapted, tmp_path, monkeypatch, caplog):
    """Another loss finds it in the cache, bit for bit; a run that goes on finds its own; a damaged one is left."""
    cache = Path(config.dpo.reference_cache)
    kept = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(kept) == 2  # of all parameters in fp32, of the frozen ones in bf16
    monkeypatch.setattr(reference, "compute", None)  # an error where it is called
    other = dataclasses.replace(config.dpo, loss="ipo_mean", beta=0.5)
    second = run(config, tmp_path, dpo=other, num_steps=2, verify_resume_steps=0, eval_every=9)
    copies = [RowValues.load(result.workdir / "reference.npz") for result in (full, second)]
    for ours, theirs in zip(copies[0].arrays(), copies[1].arrays(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for path in kept:
        path.unlink()
    run(config, tmp_path, dpo=other, num_steps=3, verify_resume_steps=0, eval_every=9, resume="auto")
    monkeypatch.undo()
    for path, data in kept.items():
        path.write_bytes(data[:-9])
    with caplog.at_level(logging.WARNING):
        run(config, tmp_path / "again", num_steps=1, verify_resume_steps=0, eval_every=9)
    assert "is damaged" in caplog.text
    again = RowValues.load(tmp_path / "again" / "run" / "reference.npz")
    for ours, theirs in zip(copies[0].arrays(), again.arrays(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_policy_that_is_not_its_reference_stops_the_run(config, full, tmp_path, monkeypatch):
    found = RowValues.load(full.workdir / "reference.npz")
    digests, values = found.arrays()
    wrong = RowValues(digests, values + 1, found.about)
    monkeypatch.setattr(dpo, "find_or_compute", lambda *args: wrong)
    with pytest.raises(ArithmeticError, match="policy is not its reference before the first step: .* nats a token"):
        run(config, tmp_path)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_reference_that_is_stopped_is_gone_on_with(config, full, tmp_path, monkeypatch):
    options = dataclasses.replace(config.dpo, reference_cache=str(tmp_path / "cache"))
    changes = {"dpo": options, "num_steps": 1, "verify_resume_steps": 0, "eval_every": 9}

    def stop_at_2(*args):
        return lambda done: not done.startswith("reference of batch 2 ")

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "make_progress", stop_at_2)
        with pytest.raises(distributed.Preempted, match="the reference of 2 of [0-9]+ batches is computed") as told:
            run(config, tmp_path, **changes)
    (path,) = (tmp_path / "cache").iterdir()
    assert RowValues.load(path).about["next_batch"] == 2
    calls: list[int] = []
    digest_rows = reference.digest_rows
    monkeypatch.setattr(reference, "digest_rows", lambda rows: calls.append(1) or digest_rows(rows))
    run(config, tmp_path, **changes)
    whole, copy = RowValues.load(full.workdir / "reference.npz"), RowValues.load(tmp_path / "run" / "reference.npz")
    for ours, theirs in zip(copy.arrays(), whole.arrays(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(calls) == int(str(told.value).split(" batches")[0].split()[-1]) - 2


def test_another_model_cannot_take_the_place_of_the_reference(config, full, tmp_path):
    """Where it has to be computed again; with the run's own copy the model that it began from is not needed."""
    params, _ = load_params(config.init_from)
    params["norm"]["weight"] = params["norm"]["weight"].at[3].add(2**-6)
    save_params(params, MODEL, tmp_path / "other", config.data.tokenizer)
    (full.workdir / "reference.npz").unlink()
    options = dataclasses.replace(config.dpo, reference_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"the run started from another model \(checksum"):
        dpo.train(
            dataclasses.replace(
                config, workdir=str(full.workdir), resume="auto", num_steps=5, init_from=str(tmp_path / "other"),
                dpo=options,
            )
        )  # fmt: skip


def test_the_key_is_of_what_the_numbers_depend_on(config, tmp_path):
    change = dataclasses.replace
    known = reference.describe(config, "0a", 3)
    assert json.loads(json.dumps(known)) == known
    for same in (
        change(config, dpo=DPOOptions(loss="hinge", beta=2.0)), change(config, mesh=MeshConfig(), seed=5),
        change(config, optimizer=OptimizerConfig(warmup_steps=1), data=change(config.data, accumulation_steps=1)),
        change(config, model=change(MODEL, z_loss_weight=0.5), workdir=str(tmp_path)),
    ):  # fmt: skip
        assert reference.describe(same, "0a", 3) == known
    shutil.copytree(config.data.sources[0].path, tmp_path / "rows")
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    manifest["train"]["files"][0]["rows_crc32"] = 7
    (tmp_path / "rows" / "manifest.json").write_text(json.dumps(manifest))
    rows = change(config.data, sources=(SourceConfig(path=str(tmp_path / "rows")),))
    others = [
        (config, "0b", 3), (config, "0a", 4), (change(config, data=rows), "0a", 3),
        (change(config, compute=change(config.compute, dtype="float32")), "0a", 3),
        (change(config, model=change(MODEL, rms_norm_eps=1e-5)), "0a", 3),
    ]  # fmt: skip
    assert all(reference.describe(*other) != known for other in others)
