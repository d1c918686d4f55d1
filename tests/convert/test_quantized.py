"""Quantized models on disk: byte for byte what was saved, on any mesh; what is damaged or impossible is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import ComputeConfig, DataConfig, ModelConfig, SourceConfig, TrainConfig
from bc2_jax.convert import conversion, quantized
from bc2_jax.convert.pretrained import find_model, load_params, load_pretrained
from bc2_jax.infer.prepared import prepare
from bc2_jax.infer.text import find_chat_settings, find_eos_ids
from bc2_jax.manifest import DamagedCheckpoint
from bc2_jax.model.baichuan import Baichuan2
from bc2_jax.model.layout import lay_out, scheme_of
from bc2_jax.train.checks import check_initial_model

CONFIG = ModelConfig(
    hidden_size=256, intermediate_size=272, num_hidden_layers=2, num_attention_heads=4, position_embedding="rope",
    vocab_size=64, model_max_length=64,
)  # fmt: skip
GENERATION = {"temperature": 0.3, "eos_token_id": [2, 195]}
SCHEMES = ("int8", "int4")


@pytest.fixture(scope="module")
def models() -> dict[str, Baichuan2]:
    model = Baichuan2(CONFIG, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    return {scheme: lay_out(model, quantize=scheme) for scheme in SCHEMES}


@pytest.fixture(scope="module")
def folders(models, small_tokenizer, tmp_path_factory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("quantized")
    for scheme, model in models.items():
        quantized.save(
            model, parent / scheme, tokenizer=small_tokenizer.path, generation=GENERATION, chat_template="{{ x }}"
        )
    return {scheme: parent / scheme for scheme in SCHEMES}


def unpacked(model: Baichuan2) -> dict:
    """The parameters, with int4 as int8, which numpy compares."""
    params = nnx.to_pure_dict(nnx.state(model))
    return jax.tree.map(lambda x: np.asarray(x.astype("int8") if x.dtype == "int4" else x), params)


@pytest.mark.parametrize("shape", [None, (1, 2, 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_comes_back_as_it_was(models, folders, mesh_of, scheme, shape):
    folder, mesh = folders[scheme], None if shape is None else mesh_of(*shape)
    found = load_pretrained(folder, dtype="float32", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, unpacked(found), unpacked(models[scheme]))
    assert scheme_of(found) == scheme and found.config == CONFIG
    prepared = prepare(found, donate=True)
    jax.tree.map(np.testing.assert_array_equal, unpacked(prepared.merge()), unpacked(models[scheme]))
    if shape is not None:
        q = found.layers.mlp.up_proj.weight[...].q
        assert q.addressable_shards[0].data.size * 4 == q.size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_lies_beside_it_is_found(folders, scheme):
    found = find_model(folders[scheme])
    assert found.is_quantized and found.config == CONFIG and found.tokenizer is not None
    assert find_eos_ids(folders[scheme]) == [2, 195]
    assert find_chat_settings(folders[scheme]) == {"temperature": 0.3}
    assert found.metadata["chat_template"] == "{{ x }}"


def test_activations_have_the_dtype_that_is_asked_for(folders):
    found = load_pretrained(folders["int8"], dtype="bfloat16")
    assert found.embed_tokens.weight[...].dtype == jnp.bfloat16
    assert found.norm.weight[...].dtype == found.lm_head.weight[...].scale.dtype == jnp.float32
    assert found.hidden_states(jnp.ones((2, 4), jnp.int32)).dtype == jnp.bfloat16


def test_four_bits_take_half_a_byte(folders):
    weights = CONFIG.num_hidden_layers * CONFIG.hidden_size * CONFIG.intermediate_size
    chunks = {s: (folders[s] / "params" / "layers.mlp.up_proj.weight.q" / "c").rglob("*") for s in SCHEMES}
    sizes = {s: sum(file.stat().st_size for file in chunks[s] if file.is_file()) for s in SCHEMES}
    checksums = 4 * CONFIG.num_hidden_layers
    assert sizes == {"int8": weights + checksums, "int4": weights // 2 + checksums}


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=9), st.integers(1, 3))
def test_packing(values, rows):
    array = np.tile(np.array(values, np.int8).astype(quantized.INT4), (rows, 1))
    packed = quantized.pack(array)
    assert packed.dtype == np.uint8 and packed.shape == (rows, (len(values) + 1) // 2)
    assert packed[0, 0] & 15 == values[0] & 15
    np.testing.assert_array_equal(quantized.unpack(packed, len(values)).astype(int), array.astype(int))


def test_it_is_not_trained_converted_or_adapted(folders, tmp_path):
    folder = folders["int8"]
    with pytest.raises(ValueError, match=r"int8 is a quantized model: it can generate, .* cannot be trained"):
        load_params(folder)
    with pytest.raises(ValueError, match="is a quantized model"):
        load_pretrained(folder, adapter=tmp_path)
    with pytest.raises(ValueError, match="is a quantized model"):
        conversion.to_hf(folder, tmp_path / "out")
    data = DataConfig(sources=(SourceConfig(path="rows"),), tokenizer="tokenizer.model", sequence_length=64)
    run = TrainConfig(name="from it", model=CONFIG, data=data, num_steps=1, init_from=str(folder))
    with pytest.raises(ValueError, match="is a quantized model"):
        check_initial_model(run)
    with pytest.raises(ValueError, match="The model is not quantized"):
        quantized.save(Baichuan2(CONFIG, rngs=nnx.Rngs(0)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_int4_for_more_devices_than_its_groups_is_refused(models, folders, mesh_of, tmp_path):
    """Heads of 64 and two parts of 256 inputs: three quarters of them cannot be cut in four."""
    mesh = mesh_of(1, 1, 4)
    with pytest.raises(ValueError, match="int4 groups support at most 8 devices"):
        load_pretrained(folders["int4"], mesh=mesh)
    load_pretrained(folders["int8"], mesh=mesh)


@pytest.mark.parametrize("change", ["byte", "missing", "scheme"])
def test_damage_is_found(folders, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(folders["int4"], folder)
    chunk = next((folder / "params" / "layers.mlp.up_proj.weight.scale").rglob("c/1/*/*"))
    message = "up_proj.weight.scale.* is damaged: its SHA-256"
    if change == "byte":
        content = bytearray(chunk.read_bytes())
        content[5] ^= 1
        chunk.write_bytes(content)
    elif change == "missing":
        chunk.unlink()
        message = "up_proj.weight.scale.* is missing"
    else:
        file = folder / "_CHECKPOINT_METADATA"
        metadata = json.loads(file.read_text())
        metadata["custom_metadata"]["quantized"] = {"scheme": "int3"}
        file.write_text(json.dumps(metadata))
        message = r"quantized = \{'scheme': 'int3'\} in its metadata is not known; legal are int8 and int4"
    with pytest.raises(DamagedCheckpoint, match=message):
        load_pretrained(folder)


def test_only_a_quantized_model_is_replaced(models, folders, tmp_path):
    target = tmp_path / "out"
    shutil.copytree(folders["int4"], target)
    with pytest.raises(FileExistsError, match="pass --overwrite to replace it"):
        quantized.save(models["int8"], target)
    quantized.save(models["int8"], target, overwrite=True)
    assert scheme_of(load_pretrained(target)) == "int8"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no conversion wrote notes\.txt"):
        quantized.save(models["int8"], target, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a").write_text("")
    with pytest.raises(FileExistsError, match="no conversion wrote a"):
        quantized.save(models["int8"], other, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["other", "out"]
