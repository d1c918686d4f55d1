"""Writing a PyTorch folder: bytes kept, layouts, nothing half-done."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest

from bc2_jax.convert import hf, table
from bc2_jax.convert.hf_config import read_config, write_config
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.convert.safetensors import read_safetensors
from tests.convert.models import DTYPES, GOLDEN, TINY, random_params, read_params, tensor_bytes, tree_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [1, 3000, 5e9])
def test_round_trips_keep_every_byte(tmp_path, dtype, shard_bytes):
    params = random_params(TINY, DTYPES[dtype])
    save_folder(params, TINY, tmp_path / "a", dtype, shard_bytes)
    assert read_config(tmp_path / "a") == TINY
    loaded = read_params(tmp_path / "a", TINY)
    assert tree_bytes(loaded) == tree_bytes(params)
    save_folder(loaded, TINY, tmp_path / "b", dtype)
    assert tensor_bytes(tmp_path / "b") == tensor_bytes(tmp_path / "a")


@pytest.mark.parametrize("name", ["rope-tiny", "alibi-tiny"])
def test_golden_round_trip(tmp_path, name):
    config = read_config(GOLDEN / name)
    save_folder(read_params(GOLDEN / name, config), config, tmp_path / "a", "float32")
    assert tensor_bytes(tmp_path / "a") == tensor_bytes(GOLDEN / name)


def test_what_is_written(tmp_path):
    tokenizer = tmp_path / "spm.model"
    tokenizer.write_bytes(b"pieces")
    save_folder(random_params(TINY, np.float32), TINY, tmp_path / "a", max_shard_bytes=3000, tokenizer_path=tokenizer)
    folder = tmp_path / "a"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert list(index["weight_map"]) == list(table.torch_shapes(TINY))
    assert index["metadata"]["total_size"] == 2 * TINY.num_parameters()
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert {f.name for f in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.model", "model.safetensors.index.json", *shards,
        "SHA256SUMS", "chat_template.jinja",
    }  # fmt: skip
    for shard in shards:
        tensors = read_safetensors(folder / shard).values()
        assert sum(2 * math.prod(t.shape) for t in tensors) <= 3000 or len(tensors) == 1
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BaichuanForCausalLM"] and config["model_type"] == "baichuan"
    assert config["torch_dtype"] == "bfloat16" and "auto_map" not in config
    assert config["max_position_embeddings"] == config["model_max_length"] == 4096
    golden = json.loads((GOLDEN / "rope-tiny" / "config.json").read_text())
    assert golden.keys() - config.keys() == {"auto_map"}
    # No settings of sampling: nobody gave any, and transformers would obey a penalty in greedy decoding too.
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_alibi_has_no_max_position_embeddings(tmp_path):
    """Other engines would take its presence for RoPE."""
    write_config(dataclasses.replace(TINY, position_embedding="alibi"), tmp_path)
    assert "max_position_embeddings" not in json.loads((tmp_path / "config.json").read_text())


def test_casts_round_to_nearest(tmp_path):
    params = random_params(TINY, np.float32)
    save_folder(params, TINY, tmp_path / "a", "bfloat16")
    loaded = table.flatten(read_params(tmp_path / "a", TINY))
    for path, array in table.flatten(params).items():
        assert loaded[path].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()


def test_float16_overflow_names_the_tensor_and_leaves_nothing(tmp_path):
    params = random_params(TINY, np.float32)
    params["layers"]["mlp"]["down_proj"]["weight"][1, 0, 0] = 70000
    with pytest.raises(ValueError, match=r"layers\.mlp\.down_proj\.weight\[1\] overflows in float16.*70000"):
        save_folder(params, TINY, tmp_path / "a", "float16")
    assert list(tmp_path.iterdir()) == []
    params["layers"]["mlp"]["down_proj"]["weight"][1, 0, 0] = np.inf  # was there before the cast
    save_folder(params, TINY, tmp_path / "a", "float16")


def test_sharded_jax_arrays(tmp_path):
    params = random_params(TINY, ml_dtypes.bfloat16)
    devices = np.array(jax.devices()[: math.gcd(len(jax.devices()), 4)])
    mesh = jax.sharding.Mesh(devices, ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))

    def shard(array: np.ndarray) -> jax.Array:
        spec = [None] * array.ndim
        spec[-1] = "fsdp"
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    save_folder(params, TINY, tmp_path / "a")
    save_folder(jax.tree.map(shard, params), TINY, tmp_path / "b")
    assert tensor_bytes(tmp_path / "a") == tensor_bytes(tmp_path / "b")


def test_params_that_do_not_fit(tmp_path):
    params = random_params(TINY, np.float32)
    del params["norm"]
    params["bias"] = np.ones(3)
    params["lm_head"]["weight"] = np.ones((16, 24))
    message = r"norm\.weight is missing; bias is unexpected; lm_head\.weight has shape \(16, 24\), expected \(24, 16\)"
    with pytest.raises(ValueError, match=message):
        save_folder(params, TINY, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_existing_target(tmp_path):
    folder = tmp_path / "a"
    first, second = random_params(TINY, np.float32, 1), random_params(TINY, np.float32, 2)
    save_folder(first, TINY, folder, "float32")
    with pytest.raises(FileExistsError, match="exists; pass --overwrite"):
        save_folder(second, TINY, folder, "float32")
    assert tree_bytes(read_params(folder, TINY)) == tree_bytes(first)
    save_folder(second, TINY, folder, "float32", overwrite=True)
    assert tree_bytes(read_params(folder, TINY)) == tree_bytes(second)
    assert list(tmp_path.iterdir()) == [folder]


def test_overwrite_never_deletes_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"is not replaced, as no conversion wrote thesis\.tex"):
        save_folder(random_params(TINY, np.float32), TINY, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


class Interrupted:
    """A parameter whose third layer cannot be read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, layer: int) -> np.ndarray:
        if layer == 1:
            raise KeyboardInterrupt
        return self.array[layer]


def test_interrupted_write_leaves_nothing_and_keeps_the_old(tmp_path):
    folder = tmp_path / "a"
    params = random_params(TINY, np.float32)
    broken = random_params(TINY, np.float32)
    broken["layers"]["mlp"]["up_proj"]["weight"] = Interrupted(broken["layers"]["mlp"]["up_proj"]["weight"])
    with pytest.raises(KeyboardInterrupt):
        save_folder(broken, TINY, folder, "float32", max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []
    save_folder(params, TINY, folder, "float32")
    with pytest.raises(KeyboardInterrupt):
        save_folder(broken, TINY, folder, "float32", overwrite=True)
    assert list(tmp_path.iterdir()) == [folder]
    assert tree_bytes(read_params(folder, TINY)) == tree_bytes(params)


def test_what_a_killed_run_left_is_replaced(tmp_path):
    stale = tmp_path / ".a.partial-0123abcd"
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").write_bytes(b"half")
    save_folder(random_params(TINY, np.float32), TINY, tmp_path / "a")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    hf.check_tensors(TINY, hf.open_folder(tmp_path / "a"))
