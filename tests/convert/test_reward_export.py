"""A reward model as a PyTorch folder; what LlamaForSequenceClassification makes of it is in tests/torch."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.config.lora import LoraConfig
from bc2_jax.convert import hf
from bc2_jax.convert.conversion import Options
from bc2_jax.convert.reward import load_reward_model
from bc2_jax.convert.reward_export import export_reward_model
from bc2_jax.convert.table import flatten, torch_shapes
from bc2_jax.model.reward import backbone_of
from tests.convert.models import TINY, random_folder, random_params
from tests.convert.test_reward import REWARD, adapter_params, write

CONVERT = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "convert.py"))["main"]
LORA = dataclasses.asdict(LoraConfig(rank=2, targets=("q_proj", "down_proj")))


def assert_holds(folder: Path, params: dict) -> None:
    """Whether the folder has the parameters, told without the table."""
    tensors = {name: tensor.read() for name, tensor in hf.open_folder(folder).items()}
    assert {name: array.shape for name, array in tensors.items()} == torch_shapes(TINY, "llama_reward")
    np.testing.assert_array_equal(tensors["score.weight"], np.asarray(params["score"]["weight"])[None])
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["norm"]["weight"])
    for i in range(TINY.num_hidden_layers):
        q = np.asarray(params["layers"]["self_attn"]["q_proj"]["weight"])[i].reshape(16, 16).T
        np.testing.assert_allclose(tensors[f"model.layers.{i}.self_attn.q_proj.weight"], q, atol=1e-6)
        down = np.asarray(params["layers"]["mlp"]["down_proj"]["weight"])[i].T
        np.testing.assert_allclose(tensors[f"model.layers.{i}.mlp.down_proj.weight"], down, atol=1e-6)


def test_a_folder_has_every_tensor(tmp_path: Path, capsys):
    path = write(tmp_path / "rm", REWARD, reward={})
    assert CONVERT(["to-hf", str(path), str(tmp_path / "hf"), "--layout", "llama", "--dtype", "float32"]) == 0
    assert_holds(tmp_path / "hf", REWARD)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert CONVERT(["inspect", str(path)]) == 0
    assert "reward model" in capsys.readouterr().out
    summary = export_reward_model(path, tmp_path / "hf", Options(overwrite=True))
    assert summary.tensors == len(flatten(REWARD))
    assert {tensor.dtype.name for tensor in hf.open_folder(tmp_path / "hf").values()} == {"bfloat16"}


def test_adapters_are_merged_also_on_an_earlier_reward_model(tmp_path: Path):
    base = random_folder(tmp_path / "base")
    first = write(tmp_path / "first", REWARD, reward={})
    trained = {"adapter": adapter_params(), "score": {"weight": np.ones(16, np.float32)}}
    for name, init_from in (("a", base), ("b", first)):
        path = write(tmp_path / name, trained, reward={}, lora=LORA, init_from=str(init_from))
        export_reward_model(path, tmp_path / f"hf_{name}", dtype="float32")
        assert_holds(tmp_path / f"hf_{name}", load_reward_model(path)[0])


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys):
    alibi = dataclasses.replace(TINY, position_embedding="alibi")
    params = backbone_of(random_params(alibi, np.float32)) | {"score": REWARD["score"]}
    path = write(tmp_path / "alibi", params, model=dataclasses.asdict(alibi), reward={})
    assert CONVERT(["to-hf", str(path), str(tmp_path / "hf"), "--layout", "llama"]) == 1
    assert "has no ALiBi" in capsys.readouterr().err
    path = write(tmp_path / "headless", backbone_of(REWARD), reward={})
    with pytest.raises(ValueError, match=r"score.weight is missing"):
        export_reward_model(path, tmp_path / "hf")
    assert CONVERT(["to-hf", str(path), str(tmp_path / "hf")]) == 1
    assert "is a reward model" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
