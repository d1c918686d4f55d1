"""What LlamaForCausalLM of `transformers` computes from a folder is what we compute, or we refuse the folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig

import bc2_jax
from bc2_jax.convert import hf
from bc2_jax.convert.conversion import to_orbax
from bc2_jax.convert.hf_config import read_config, read_generation_config
from bc2_jax.convert.pickled import read_pickled
from bc2_jax.convert.reading import Reading
from bc2_jax.convert.torch_model import forward
from tests.convert.models import GOLDEN

IDS = np.random.default_rng(0).integers(3, 60, (2, 24))


def make(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "initializer_range": 0.2, "max_position_embeddings": 64,
    } | changes)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model: LlamaForCausalLM) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


def ours(folder: Path, **options) -> np.ndarray:
    return np.asarray(bc2_jax.load_pretrained(folder, **options)(jnp.asarray(IDS)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    make().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rms_norm_eps": 1e-3},
        {"num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "eos_token_id": [2, 7]},
    ],
)
def test_what_transformers_saves(tmp_path, changes):
    model = make(**changes)
    model.save_pretrained(tmp_path / "a")
    np.testing.assert_allclose(ours(tmp_path / "a"), logits(model), atol=2e-5)
    config = read_config(tmp_path / "a")
    outputs = forward(config, hf.open_folder(tmp_path / "a"), IDS)
    np.testing.assert_allclose(outputs.logits, logits(model), atol=2e-5)
    generation = read_generation_config(tmp_path / "a")
    assert generation["eos_token_id"] == changes.get("eos_token_id", 2)


# Keys that LlamaForCausalLM obeys, with values that change what it computes and values that do not.
OBEYED = [
    ({"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}, True),
    ({"rope_parameters": None, "rope_theta": 100.0}, True),
    ({"rope_parameters": None, "rope_scaling": {"rope_type": "default"}}, True),
    ({"rms_norm_eps": 0.1}, True),
    ({"pad_token_id": None, "attention_dropout": 0.5}, True),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}, False),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}}, False),
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, False),
    ({"hidden_act": "gelu"}, False),
    ({"tie_word_embeddings": True}, False),
]


@pytest.mark.parametrize(("changes", "accepted"), OBEYED, ids=lambda value: json.dumps(value))
def test_keys_are_obeyed_or_refused(saved, tmp_path, changes, accepted):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in (raw | changes).items() if not (key in changes and value is None)}
    (folder / "config.json").write_text(json.dumps(raw))
    if not accepted:
        with pytest.raises(ValueError, match="is not supported"):
            bc2_jax.load_pretrained(folder)
        return
    theirs = logits(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    np.testing.assert_allclose(ours(folder), theirs, atol=2e-5)


def test_no_key_that_transformers_writes_is_missed(tmp_path, caplog):
    """All keys with their defaults, those of a config without a kind of model too."""
    everything = PretrainedConfig().to_dict() | make().config.to_dict() | GenerationConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(everything))
    assert read_config(tmp_path).hidden_size == 32
    assert not [record for record in caplog.records if record.levelname == "WARNING" and record.name.startswith("bc2")]


def test_grouped_queries_are_refused(tmp_path):
    make(num_key_value_heads=2).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="num_key_value_heads = 2 is not supported: only 4"):
        read_config(tmp_path / "a")


def test_a_baichuan2_made_a_llama(tmp_path):
    """As the scripts do it that are about: q, k, v are thirds of W_pack, the head's rows are normalised by torch."""
    golden = GOLDEN / "rope-tiny"
    state = {}
    for name, tensor in hf.open_folder(golden).items():
        array = torch.from_numpy(tensor.read().copy())
        if "W_pack" in name:
            for part, rows in zip("qkv", array.chunk(3), strict=True):
                state[name.replace("W_pack", f"{part}_proj")] = rows.clone()
        else:
            state[name] = torch.nn.functional.normalize(array) if name == "lm_head.weight" else array
    config = read_config(golden)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in sizes}, rms_norm_eps=1e-6))
    model.load_state_dict(state)
    model.eval().save_pretrained(tmp_path / "a")
    released = ours(golden)
    np.testing.assert_allclose(logits(model), released, atol=2e-5)
    done = to_orbax(tmp_path / "a", tmp_path / "ckpt")
    assert not done.config.normalize_head
    np.testing.assert_allclose(ours(tmp_path / "ckpt"), released, atol=2e-5)
    np.testing.assert_allclose(ours(tmp_path / "a", reading=Reading(normalize_head=True)), released, atol=2e-5)


def test_what_trainers_save(tmp_path):
    """torch.save of a model with its optimizer, compiled and wrapped, in one file."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.from_numpy(IDS)).logits.mean().backward()
    optimizer.step()
    expected = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    others = {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict(), "step": 3, "loss": 0.5}
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, value in enumerate((model.state_dict(), {"model": model.state_dict(), **others}, {"state_dict": wrapped})):
        path = tmp_path / f"{i}.bin"
        torch.save(value, path)
        found = {name.removeprefix("module."): t.read().tobytes() for name, t in read_pickled(path).items()}
        assert found == expected


def test_torch_compiles_names(tmp_path):
    """The names that torch.compile and DataParallel make are those that --strip-prefix takes away."""
    model = make()
    model.save_pretrained(tmp_path / "a")
    expected = ours(tmp_path / "a")
    for wrapped, prefix in ((torch.compile(model), "_orig_mod."), (torch.nn.DataParallel(model), "module.")):
        folder = tmp_path / prefix
        folder.mkdir()
        shutil.copy(tmp_path / "a" / "config.json", folder)
        torch.save(wrapped.state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"pass --strip-prefix {prefix}"):
            bc2_jax.load_pretrained(folder)
        np.testing.assert_array_equal(ours(folder, reading=Reading(strip_prefix=prefix)), expected)


def test_a_folder_of_float64_and_bfloat16(tmp_path):
    model = make()
    model.model.layers[1].mlp.to(torch.bfloat16)
    model.model.norm.double()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    np.testing.assert_allclose(ours(tmp_path), logits(model.float()), atol=2e-5)
    assert dataclasses.replace(read_config(tmp_path)).num_hidden_layers == 2
