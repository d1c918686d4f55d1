"""Reward models, and the actor and critic of a run of PPO, on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from bc2_jax.checkpoint import save_context
from bc2_jax.config.lora import LoraConfig
from bc2_jax.convert.adapter import describe, find_adapter
from bc2_jax.convert.conversion import to_hf, to_orbax
from bc2_jax.convert.inspection import inspect
from bc2_jax.convert.merging import merge_lora
from bc2_jax.convert.pretrained import find_model, load_params
from bc2_jax.convert.reward import (
    describe_reward_model,
    find_critic,
    find_reward_model,
    load_backbone,
    load_critic,
    load_reward_model,
)
from bc2_jax.model.baichuan import param_shardings
from bc2_jax.model.lora import Adapter, init_adapter, merge
from bc2_jax.model.reward import RewardModel, backbone_of
from tests.convert.models import TINY, random_folder, random_params, tree_bytes

LORA = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
LM = random_params(TINY, np.float32)
REWARD = backbone_of(random_params(TINY, np.float32, 1)) | {"score": {"weight": np.linspace(-1, 1, 16, dtype="f4")}}


def write(folder: Path, params: dict, **config) -> Path:
    """A params-only checkpoint whose run had these further fields in its config."""
    metadata = {"config": {"model": dataclasses.asdict(TINY)} | config}
    with save_context():
        ocp.save_checkpointables(folder.absolute(), {"params": params}, custom_metadata=metadata)
    return folder


def adapter_params() -> dict:
    params = init_adapter(LORA, TINY, LM, 0, None)

    return jax.tree.map(lambda x: np.asarray(x) + 0.1, params)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reward")
    lora = dataclasses.asdict(LORA)
    base = random_folder(folder / "base")
    checkpoints = folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    reward = write(checkpoints / "30", REWARD, reward={"centring": 0.0})
    (folder / "run" / "rewards.json").write_text('{"30": {"mean": 0.5, "std": 2, "answers": 8}}')
    adapted = {"adapter": adapter_params(), "score": REWARD["score"]}
    rl = {"algorithm": "ppo", "reward_model": str(reward)}
    return {
        "base": base, "reward": reward, "run": folder / "run",
        "reward_lora": write(folder / "reward_lora", adapted, reward={}, lora=lora, init_from=str(base)),
        "rl": write(folder / "rl", {"actor": LM, "critic": REWARD}, ppo=rl),
        "grpo": write(folder / "grpo", {"actor": LM}, ppo={"algorithm": "grpo", "reward_model": None}),
        "rl_lora": write(
            folder / "rl_lora", {"actor": adapter_params(), "critic": adapted}, ppo=rl, lora=lora, init_from=str(base)
        ),
    }  # fmt: skip


def same(ours: dict, expected: dict) -> bool:
    return tree_bytes(ours) == tree_bytes(expected)


def numpy(params: dict) -> dict:

    return jax.tree.map(np.asarray, params)


def test_a_reward_model_is_found_and_loaded_on_any_mesh(places, mesh_of):
    params, config, found = load_reward_model(places["run"])
    assert config == TINY and found.path == places["reward"] and found.lora is None
    assert found.statistics == {"mean": 0.5, "std": 2.0, "answers": 8.0}
    assert same(numpy(params), REWARD)
    mesh = mesh_of(1, 2, 2)
    params, _, _ = load_reward_model(places["reward"], "bfloat16", mesh)
    expected = param_shardings(TINY, mesh, RewardModel)
    assert params["score"]["weight"].dtype == np.float32 and params["norm"]["weight"].dtype == "bfloat16"
    assert params["layers"]["mlp"]["up_proj"]["weight"].sharding == expected["layers"]["mlp"]["up_proj"]["weight"]
    assert same({"score": numpy(params["score"])}, {"score": REWARD["score"]})


def test_one_with_an_adapter_is_merged_into_the_model_it_began_from(places, mesh_of):
    params, _, found = load_reward_model(places["reward_lora"])
    assert found.lora == LORA and found.statistics is None
    merged = merge(LM, Adapter(LORA, adapter_params()))
    assert same(numpy(params), numpy(backbone_of(merged)) | {"score": REWARD["score"]})
    on_mesh, _, _ = load_reward_model(places["reward_lora"], "float32", mesh_of(1, 2, 2))
    np.testing.assert_allclose(
        on_mesh["layers"]["mlp"]["down_proj"]["weight"], params["layers"]["mlp"]["down_proj"]["weight"], atol=1e-6
    )


def test_what_it_is_is_said(places):
    assert describe_reward_model(places["base"]) == describe_reward_model(places["rl"]) == ()
    assert any("mean 0.5000" in line for line in describe_reward_model(places["run"]))
    assert any("rank 2" in line for line in describe_reward_model(places["reward_lora"]))


def test_backbones_of_every_kind(places):
    for name, expected in (("base", LM), ("reward", REWARD), ("rl", LM)):
        params, _ = load_backbone(places[name])
        assert same(numpy(params), backbone_of(expected)), name


@pytest.mark.parametrize("name", ["reward", "run", "reward_lora"])
def test_who_takes_it_for_a_language_model_is_told_what_it_is(places, name: str, tmp_path: Path):
    told = "is a reward model, which scores conversations"
    for refused in (
        lambda path: find_model(path), lambda path: load_params(path), lambda path: find_adapter(path),
        lambda path: inspect(path), lambda path: to_hf(path, tmp_path / "hf"),
        lambda path: merge_lora(places["base"], path, tmp_path / "hf"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            refused(places[name])
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_reward_model_is_refused(places, tmp_path: Path):
    with pytest.raises(ValueError, match="is a language model, not a reward model"):
        find_reward_model(places["base"])
    with pytest.raises(ValueError, match="is a language model"):
        find_reward_model(places["rl"])
    for name in ("reward", "grpo"):
        with pytest.raises(ValueError, match="has no critic"):
            find_critic(places[name])
    with pytest.raises(FileNotFoundError):
        find_critic(tmp_path)


def test_a_base_that_is_gone_or_another_is_named(places, tmp_path: Path):
    adapted = {"adapter": adapter_params(), "score": REWARD["score"]}
    path = write(tmp_path / "a", adapted, reward={}, lora=dataclasses.asdict(LORA), init_from="gone")
    with pytest.raises(FileNotFoundError, match="needs the model that its run started from: gone does not exist"):
        load_reward_model(path)
    other = random_folder(tmp_path / "other", dataclasses.replace(TINY, vocab_size=30))
    path = write(tmp_path / "b", adapted, reward={}, lora=dataclasses.asdict(LORA), init_from=str(other))
    with pytest.raises(ValueError, match="is of another architecture"):
        load_reward_model(path)
    path = write(tmp_path / "c", backbone_of(LM), reward={})
    with pytest.raises(ValueError, match=r"score.weight is missing"):
        load_reward_model(path)


@pytest.mark.parametrize("name", ["rl", "grpo"])
def test_the_actor_is_the_language_model_of_an_rl_run(places, name: str, tmp_path: Path):
    assert same(numpy(load_params(places[name])[0]), LM)
    assert inspect(places[name]).is_consistent
    summary = to_hf(places[name], tmp_path / "hf")
    assert same(numpy(load_params(tmp_path / "hf")[0]), LM)
    left = any("not carried over: params/critic" in note for note in summary.notes)
    assert left == (name == "rl")
    to_orbax(places[name], tmp_path / "alone")
    assert find_model(tmp_path / "alone").part == ""


def test_the_critic_of_a_ppo_run_is_loaded_as_a_reward_model(places):
    params, config, found = load_critic(places["rl"])
    assert config == TINY and found.part == "critic"
    assert same(numpy(params), REWARD)
    params, _, _ = load_critic(places["rl_lora"])
    merged = merge(REWARD, Adapter(LORA, adapter_params()))
    assert same(numpy(params), numpy(merged))


def test_the_critic_of_a_run_without_a_reward_model_began_from_its_actor(places, tmp_path: Path):
    trained = {"actor": adapter_params(), "critic": {"adapter": adapter_params(), "score": REWARD["score"]}}
    config = {"lora": dataclasses.asdict(LORA), "init_from": str(places["base"]), "ppo": {"reward_model": None}}
    params, _, _ = load_critic(write(tmp_path / "rl", trained, **config))
    merged = backbone_of(merge(LM, Adapter(LORA, adapter_params())))
    assert same(numpy(params), numpy(merged) | {"score": REWARD["score"]})


def test_the_adapter_of_an_actor_is_merged_and_what_stays_is_said(places, tmp_path: Path):
    found = find_adapter(places["rl_lora"])
    assert found is not None and found.config == LORA
    assert any("all else stays in the checkpoint" in line for line in describe(found))
    with pytest.raises(ValueError, match="is a LoRA adapter"):
        find_model(places["rl_lora"])
    summary = merge_lora(places["base"], places["rl_lora"], tmp_path / "merged")
    assert "not carried over from the adapter's checkpoint: params/critic" in summary.notes
    merged = merge(LM, Adapter(LORA, adapter_params()))
    ours = numpy(load_params(tmp_path / "merged")[0])
    np.testing.assert_allclose(
        ours["layers"]["self_attn"]["q_proj"]["weight"], merged["layers"]["self_attn"]["q_proj"]["weight"], atol=1e-6
    )


@pytest.mark.parametrize(
    "text", ["", "[]", '{"30": {"mean": 1}}', '{"30": {"mean": "x", "std": 1, "answers": 1}}', json.dumps({"30": None})]
)
def test_statistics_of_no_use_are_none(tmp_path: Path, text: str):
    (tmp_path / "rewards.json").write_text(text)
    (tmp_path / "checkpoints").mkdir()
    path = write(tmp_path / "checkpoints" / "30", REWARD, reward={})
    assert find_reward_model(path).statistics is None
