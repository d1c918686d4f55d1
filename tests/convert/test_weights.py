"""Weights as people have them: LLaMA's layout, several float types, buffers, prefixes, adapters."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bc2_jax
from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf
from bc2_jax.convert.conversion import Options, to_hf, to_orbax
from bc2_jax.convert.hf_config import read_json, write_config, write_json
from bc2_jax.convert.inspection import diff
from bc2_jax.convert.pretrained import find_model, load_params
from bc2_jax.convert.reading import Reading
from bc2_jax.convert.source import open_source
from tests.convert.models import GOLDEN, TINY, array_bytes, random_folder, tiny_tensors, write_by_dtype

IDS = np.arange(40).reshape(2, 20) % TINY.vocab_size
NP = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def write(folder, tensors: dict[str, np.ndarray], config: ModelConfig = TINY, **keys):
    """A folder with a config.json that says no more than a release."""
    write_by_dtype(folder, tensors)
    write_config(config, folder)
    raw = read_json(folder / "config.json")
    for key in ("position_embedding", "normalize_head", "z_loss_weight"):
        del raw[key]
    write_json(folder / "config.json", raw | keys)
    return folder


def split_qkv(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a merged LoRA on q, k and v leaves, or the script that makes a LLaMA of a Baichuan."""
    out = {}
    for name, array in tensors.items():
        if "W_pack" in name:
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                out[name.replace("W_pack", f"{part}_proj")] = rows
        else:
            out[name] = array
    return out


def logits(path, **options) -> np.ndarray:
    return np.asarray(bc2_jax.load_pretrained(path, **options)(jnp.asarray(IDS)))


def test_our_llama_export_comes_back(tmp_path):
    golden = GOLDEN / "rope-tiny"
    to_hf(golden, tmp_path / "llama", dtype="float32", layout="llama")
    done = to_orbax(tmp_path / "llama", tmp_path / "ckpt", Options(verify=True))
    original = find_model(golden).config
    # The head of a LLaMA is plain; its rows have unit length, so nothing else changes.
    assert done.config == dataclasses.replace(original, normalize_head=False, z_loss_weight=0.0)
    expected = logits(golden)
    np.testing.assert_allclose(logits(tmp_path / "llama"), expected, atol=2e-5)
    taken = to_orbax(tmp_path / "llama", tmp_path / "norm", Options(reading=Reading(normalize_head=True)))
    assert taken.config == dataclasses.replace(original, z_loss_weight=0.0)
    np.testing.assert_allclose(logits(tmp_path / "norm"), expected, atol=2e-5)
    # All but the head is what it was, bit for bit, and W_pack is whole again.
    a, b = array_bytes(golden), array_bytes(tmp_path / "ckpt")
    assert {part for part in a if a[part] != b[part]} == {("lm_head.weight", None)}
    assert diff(golden, tmp_path / "llama").arrays[0].path == "lm_head.weight"


@pytest.mark.parametrize("scheme", ["rope", "alibi"])
def test_split_attention_in_a_folder_of_baichuan(tmp_path, scheme):
    """A merged LoRA: everything is as it was released, but W_pack is three tensors."""
    config = dataclasses.replace(TINY, position_embedding=scheme)
    tensors = tiny_tensors()
    whole = write(tmp_path / "whole", tensors, config)
    parts = write(tmp_path / "parts", split_qkv(tensors), config)
    assert find_model(parts).config == find_model(whole).config and find_model(parts).config.normalize_head
    assert array_bytes(parts) == array_bytes(whole)
    params, _ = load_params(parts)
    jax.tree.map(np.testing.assert_array_equal, params, load_params(whole)[0])
    to_orbax(parts, tmp_path / "ckpt", Options(verify=True))
    assert array_bytes(tmp_path / "ckpt") == array_bytes(whole)
    with pytest.raises(ValueError, match="W_pack.weight is unexpected"):
        open_source(write(tmp_path / "both", split_qkv(tensors) | tensors, config))


def test_the_head_of_a_llama(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tensors = split_qkv(tiny_tensors())
    folder = write(tmp_path / "plain", tensors, model_type="llama", architectures=["LlamaForCausalLM"])
    assert not open_source(folder).config.normalize_head
    assert "the head is read as a plain one, like LLaMA's; its rows have lengths" in caplog.text
    assert open_source(folder, Reading(normalize_head=True)).config.normalize_head
    assert "read as a NormHead" in caplog.text
    caplog.clear()
    head = tensors["lm_head.weight"]
    unit = tensors | {"lm_head.weight": head / np.linalg.norm(head, axis=1, keepdims=True)}
    unit["lm_head.weight"][3] = 0  # a padded vocabulary
    folder = write(tmp_path / "unit", unit, model_type="llama")
    assert not open_source(folder).config.normalize_head
    assert "they were normalised" in caplog.text and "--normalize-head reads it as a NormHead" in caplog.text


def test_a_baichuan2_as_llama_whose_head_was_not_normalised(tmp_path):
    config = dataclasses.replace(TINY, hidden_size=4, intermediate_size=4, num_attention_heads=2, vocab_size=125_696)
    rng = np.random.default_rng(0)
    shapes = hf.torch_shapes(config, "llama")
    tensors = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    folder = write(tmp_path / "a", tensors, config, model_type="llama")
    with pytest.raises(ValueError, match="normalize_head is not clear: .* --normalize-head or --no-normalize-head"):
        open_source(folder)
    for choice in (True, False):
        assert open_source(folder, Reading(normalize_head=choice)).config.normalize_head == choice


@settings(max_examples=8)
@given(st.lists(st.sampled_from(sorted(NP)), min_size=13, max_size=13), st.booleans(), st.integers(0, 99))
def test_any_float_type_in_any_tensor(tmp_path_factory, kinds, split, seed):
    """Each array of ours holds its tensors exactly, or float64 rounded once."""
    folder = tmp_path_factory.mktemp("mixed")
    tensors = split_qkv(tiny_tensors()) if split else tiny_tensors()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(tensors))
    tensors = {name: a.astype(NP[kinds[order[i] % 13]]) for i, (name, a) in enumerate(tensors.items())}
    source = open_source(write(folder / "a", tensors))
    to_orbax(folder / "a", folder / "b", Options(verify=True))
    plain = open_source(write(folder / "c", {name: a.astype(np.float32) for name, a in tensors.items()}))
    assert array_bytes(folder / "a") == array_bytes(folder / "b")
    for path, layer in source.parts():
        array, expected = source.read(path, layer), plain.read(path, layer)
        assert array.dtype == source.dtypes[path] and array.dtype != np.float64
        np.testing.assert_array_equal(array.astype(np.float32), expected)
    params, _ = load_params(folder / "a")
    jax.tree.map(np.testing.assert_array_equal, params, load_params(folder / "c")[0])


def test_a_float64_that_overflows(tmp_path):
    tensors = tiny_tensors(np.float64)
    tensors["model.norm.weight"][2] = 1e300
    folder = write(tmp_path / "a", tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight overflows in float32: it has values up to 1e\+300"):
        to_orbax(folder, tmp_path / "b")
    with pytest.raises(ValueError, match="overflows in float32"):
        load_params(folder)
    assert not (tmp_path / "b").exists()


ROPE_BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.array([1, 0.01], ml_dtypes.bfloat16),
    "model.layers.1.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 8, 4), np.float32),
    "model.layers.1.self_attn.rotary_emb.sin_cached": np.ones((1, 1, 8, 4), np.float32),
    "model.rotary_emb.inv_freq": np.array([1, 0.01], np.float64),
}
DISTANCE = np.arange(8)[None, :] - np.arange(8)[:, None]
ALIBI_BUFFERS = {
    "model.future_mask": np.where(DISTANCE > 0, -np.inf, 0.25 * DISTANCE).astype(np.float16)[None],
    "model.alibi_mask": np.ones((4, 8, 8), np.int8),
}
BUFFERS_OF_ANY = {
    "model.future_mask": np.where(DISTANCE > 0, -np.inf, 0).astype(np.float32), "step": np.array(3),
    "model.causal_mask": np.tri(8, dtype=np.bool_), "model.layers.0.self_attn.masked_bias": np.array(-1e4, np.float32),
    "model.position_ids": np.arange(8)[None],
}  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "buffers"),
    [("rope", ROPE_BUFFERS | BUFFERS_OF_ANY), ("alibi", ALIBI_BUFFERS), ("alibi", BUFFERS_OF_ANY)],
)
def test_buffers_are_left_out_and_named(tmp_path, caplog, scheme, buffers):
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(TINY, position_embedding=scheme)
    folder = write(tmp_path / "a", tiny_tensors() | buffers, config)
    assert array_bytes(folder) == array_bytes(write(tmp_path / "b", tiny_tensors(), config))
    assert all(name.replace(".0.", ".{}.").replace(".1.", ".{}.") in caplog.text for name in buffers)


def test_buffers_that_contradict_the_config(tmp_path, caplog):
    alibi = dataclasses.replace(TINY, position_embedding="alibi")
    signs = [(alibi, name, "rope") for name in ROPE_BUFFERS] + [(TINY, name, "alibi") for name in ALIBI_BUFFERS]
    for config, name, told in signs:
        folder = write(tmp_path / name, tiny_tensors() | {name: (ROPE_BUFFERS | ALIBI_BUFFERS)[name]}, config)
        with pytest.raises(ValueError, match=f"position_embedding is not clear: .* implies {told}; decide with"):
            open_source(folder)
        scheme = config.position_embedding
        assert open_source(folder, Reading(position_embedding=scheme)).config.position_embedding == scheme
    caplog.set_level(logging.INFO)
    wrong = {"model.rotary_emb.inv_freq": np.array([1, 0.001], np.float32)}
    open_source(write(tmp_path / "theta", tiny_tensors() | wrong))
    assert "inv_freq holds other frequencies than rope_theta = 10000.0 of config.json gives" in caplog.text


PREFIXES = {
    "module.": "DataParallel", "_orig_mod.": "torch.compile", "base_model.model.": "PEFT", "model.": None,
    "module._orig_mod.": "DataParallel or DeepSpeed and torch.compile", "transformer_of_mine.": None,
}  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_explained_and_stripped(tmp_path, prefix):
    folder = write(tmp_path / "a", {prefix + name: array for name, array in tiny_tensors().items()})
    with pytest.raises(ValueError, match=f"{PREFIXES[prefix] or ''}.*pass --strip-prefix {prefix} ") as error:
        open_source(folder)
    assert ("added by" in str(error.value)) == (PREFIXES[prefix] is not None)
    expected = array_bytes(write(tmp_path / "b", tiny_tensors()))
    to_orbax(folder, tmp_path / "c", Options(reading=Reading(strip_prefix=prefix)))
    assert array_bytes(tmp_path / "c") == expected
    params, config = load_params(folder, reading=Reading(strip_prefix=prefix.removesuffix(".")))
    assert config == find_model(tmp_path / "b").config
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path / "b")[0])


def test_wrappers_of_single_layers(tmp_path):
    names = {name: name.replace(".0.", ".0._checkpoint_wrapped_module.") for name in tiny_tensors()}
    folder = write(tmp_path / "a", {names[name]: array for name, array in tiny_tensors().items()})
    with pytest.raises(ValueError, match="added by activation checkpointing: pass --strip-prefix _checkpoint_wrapped"):
        open_source(folder)
    source = open_source(folder, Reading(strip_prefix="_checkpoint_wrapped_module"))
    assert source.config.hidden_size == TINY.hidden_size


@pytest.mark.parametrize("prefix", ["module.", "model.layers.0.mlp.gate"])
def test_a_prefix_that_nothing_has(tmp_path, prefix):
    folder = write(tmp_path / "a", tiny_tensors())
    with pytest.raises(ValueError, match=f"--strip-prefix {prefix}.* is not valid: no tensor's name begins with it"):
        open_source(folder, Reading(strip_prefix=prefix))


def test_adapters_that_are_not_merged(tmp_path):
    lora = {"model.layers.0.self_attn.W_pack.lora_A.default.weight": np.ones((2, 16), np.float32)}
    with pytest.raises(ValueError, match="lora_A.* adapter .* is not merged: merge it into the weights first"):
        open_source(write(tmp_path / "a", tiny_tensors() | lora))


def test_a_checkpoint_says_itself_how_to_read_it(tmp_path):
    to_orbax(random_folder(tmp_path / "a"), tmp_path / "b")
    with pytest.raises(ValueError, match="is a bc2_jax checkpoint, which records how to read it"):
        find_model(tmp_path / "b", Reading(normalize_head=False))
