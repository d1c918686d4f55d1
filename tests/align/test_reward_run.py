"""Whole runs of reward models, all parameters or adapters: they learn, resume, are replayed, found and scored."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.align import reward
from bc2_jax.align.reward_report import judge, read_pairs
from bc2_jax.align.scoring import Scorer
from bc2_jax.config import (
    TOKENIZER_OF_BASE,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RewardOptions,
    SampleConfig,
    SourceConfig,
)
from bc2_jax.convert.hf import open_folder
from bc2_jax.convert.pretrained import save_params
from bc2_jax.convert.reward import find_reward_model, load_reward_model
from bc2_jax.model.baichuan import init_params
from bc2_jax.sharding import make_mesh
from bc2_jax.train.loop import RunResult
from bc2_jax.train.metrics import read_metrics

replay = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "replay.py"))["main"]
MODEL = ModelConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, position_embedding="rope",
    vocab_size=490, z_loss_weight=0.0,
)  # fmt: skip
PLACES = ("mat", "log", "cat", "dog")


def records(count: int) -> list[dict]:
    """Who says where the cat sat is preferred to who says where the dog sat."""
    return [
        {
            "prompt": f"the {PLACES[i % 4]} and the {PLACES[i // 4 % 4]} " + "and the log " * (i // 16),
            "chosen": f"the cat sat on the {PLACES[i % 3]}", "rejected": f"the dog sat on the {PLACES[i % 3]}",
            "margin": i % 3 / 4,
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config(small_tokenizer, tmp_path_factory) -> RewardConfig:
    folder = tmp_path_factory.mktemp("reward")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(64)))
    save_params(init_params(MODEL, 1, make_mesh(MeshConfig())), MODEL, folder / "base", Path(small_tokenizer.path))
    return RewardConfig(
        name="test", model=MODEL, init_from=str(folder / "base"),
        data=DataConfig(
            sources=(SourceConfig(path=str(folder / "pairs.jsonl")),), tokenizer=TOKENIZER_OF_BASE, sequence_length=64,
            global_batch_size=8, accumulation_steps=2,
        ),
        compute=ComputeConfig(dtype="float32", attention="reference", remat="none"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, min_learning_rate=1e-2, warmup_steps=0),
        checkpoint=CheckpointConfig(save_every=4, keep_last=9),
        num_steps=8, eval_every=4, verify_resume_steps=4, export_hf=True,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def full(config, tmp_path_factory) -> RunResult:
    return reward.train(dataclasses.replace(config, workdir=str(tmp_path_factory.mktemp("full") / "run")))


@pytest.fixture(scope="module")
def adapted(config, full, tmp_path_factory) -> RunResult:
    """Adapters on the reward model of `full`, without margins."""
    lora = LoraConfig(rank=2, targets=("q_proj", "down_proj"), dropout=0.2)
    return reward.train(
        dataclasses.replace(
            config, workdir=str(tmp_path_factory.mktemp("adapted") / "run"), init_from=str(full.workdir), lora=lora,
            reward=RewardOptions(use_margins=False, centring=0.0),
        )
    )  # fmt: skip


def evaluations(result: RunResult) -> list[dict]:
    return [m for m in read_metrics(result.workdir / "metrics.jsonl") if "validation_accuracy" in m]


def test_it_learns_what_is_preferred(full, adapted):
    first, *_, last = evaluations(full)
    assert (first["step"], last["step"]) == (0, 8)
    assert last["validation_accuracy"] == 1 and last["validation_loss"] < first["validation_loss"]
    assert last["validation_reward_margin"] > 0.5
    margins = [m["margin_asked"] for m in read_metrics(full.workdir / "metrics.jsonl") if "margin_asked" in m]
    assert np.mean(margins) == pytest.approx(0.25, abs=0.1)
    # The adapters begin as nothing, beside the backbone and the score of the other run.
    assert evaluations(adapted)[0]["validation_reward_mean"] == pytest.approx(last["validation_reward_mean"], abs=1e-4)
    assert evaluations(adapted)[0]["validation_margin_asked"] == 0


@pytest.mark.parametrize("name", ["full", "adapted"])
def test_steps_are_identical_when_they_are_done_again(name: str, request, capsys):
    """The run itself has resumed at step 4 and compared the parameters (verify_resume_steps)."""
    result = request.getfixturevalue(name)
    assert replay([str(result.workdir), "--step", "8"]) == 0
    out = capsys.readouterr().out
    assert "identical" in out and "parameters sha256" in out


@pytest.mark.parametrize("name", ["full", "adapted"])
def test_a_scorer_of_the_run_gives_its_held_out_rewards(name: str, request, config):
    result = request.getfixturevalue(name)
    source = Path(json.loads((result.workdir / "config.json").read_text())["data"]["sources"][0]["path"])
    samples, _ = read_pairs([source])
    judged, cut, lost = judge(Scorer.load(result.workdir), samples)
    last = evaluations(result)[-1]
    assert (len(judged), cut, lost) == (last["validation_pairs"], 0, 0)
    rewards = np.array([(pair.chosen, pair.rejected) for pair in judged])
    found = find_reward_model(result.workdir)
    assert found.statistics == pytest.approx(
        {"mean": rewards.mean(), "std": rewards.std(), "answers": rewards.size}, abs=1e-4
    )
    assert np.mean(rewards[:, 0] > rewards[:, 1]) == last["validation_accuracy"]
    assert (result.workdir / "rewards.png").stat().st_size > 1000
    score = np.asarray(load_reward_model(result.workdir)[0]["score"]["weight"])
    np.testing.assert_array_equal(open_folder(result.workdir / "hf")["score.weight"].read()[0], score)


def test_what_is_not_valid_is_refused(config, full, adapted, tmp_path):
    for changes, told in (
        ({"init_from": None}, "a reward model starts from"),
        ({"sample": SampleConfig(prompts=("a",))}, "sample.prompts"),
        ({"ngram_baselines": True}, "ngram_baselines"),
        ({"evaluate": EvaluateConfig(tasks=("ceval",), data_dir="x")}, "evaluate.tasks"),
        ({"model": dataclasses.replace(MODEL, position_embedding="alibi")}, "export_hf"),
    ):
        with pytest.raises(ValueError, match=told):
            reward.complete(dataclasses.replace(config, **changes))
    again = dataclasses.replace(
        config, workdir=str(adapted.workdir), init_from=str(full.workdir), resume="auto", num_steps=9
    )
    with pytest.raises(ValueError, match="these fields differ: lora"):
        reward.train(again)
