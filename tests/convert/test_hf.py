from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import BAICHUAN2_7B, BAICHUAN2_13B, ModelConfig
from bc2_jax.convert import hf, table
from bc2_jax.convert.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = ModelConfig(
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    position_embedding="rope",
    vocab_size=24,
)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def random_params(config: ModelConfig, dtype: type, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = table.param_shapes(config)
    return table.unflatten({path: rng.standard_normal(shape).astype(dtype) for path, shape in shapes.items()})


def write_tensors(folder: Path, files: dict[str, dict[str, np.ndarray]], index: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for file, tensors in files.items():
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        dtype = next(iter(tensors.values())).dtype
        write_safetensors(folder / file, dtype, shapes, tensors.items())
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def tiny_tensors(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in table.torch_shapes(TINY).items()}


def tensor_bytes(folder: Path) -> dict[str, tuple]:
    arrays = {name: tensor.read() for name, tensor in hf.open_folder(folder).items()}
    return {name: (a.shape, a.dtype, a.tobytes()) for name, a in arrays.items()}


def tree_bytes(params: dict) -> dict[str, tuple]:
    return {path: (a.shape, a.dtype, a.tobytes()) for path, a in table.flatten(params).items()}


# ---------------------------------------------------------------------------------------------------- config.json


@st.composite
def configs(draw) -> ModelConfig:
    heads, vocab = draw(st.integers(1, 64)), draw(st.integers(1, 200_000))
    small = st.floats(1e-12, 1e6)
    return ModelConfig(
        hidden_size=heads * 2 * draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(1, 20_000)),
        num_hidden_layers=draw(st.integers(1, 100)),
        num_attention_heads=heads,
        position_embedding=draw(st.sampled_from(["rope", "alibi"])),
        vocab_size=vocab,
        model_max_length=draw(st.integers(1, 10**6)),
        rms_norm_eps=draw(small),
        initializer_range=draw(small),
        rope_theta=draw(small),
        normalize_head=draw(st.booleans()),
        z_loss_weight=draw(st.floats(0, 1)),
        **{f"{name}_token_id": draw(st.integers(0, vocab - 1)) for name in ("pad", "bos", "eos")},
    )


@given(configs())
@settings(max_examples=200, deadline=None)
def test_config_round_trip(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp()
    hf.write_config(config, folder)
    assert hf.read_config(folder) == config


def write_raw(folder: Path, without: tuple[str, ...] = (), **changes) -> Path:
    """config.json of the released 7B model, changed."""
    raw = {
        "architectures": ["BaichuanForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_max_length": 4096,
        "model_type": "baichuan",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 125696,
    } | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in without}))
    return folder


SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 40}


@pytest.mark.parametrize(
    ("without", "changes", "expected", "reason"),
    [
        ((), {"z_loss_weight": 0}, BAICHUAN2_7B, "max_position_embeddings = 4096 is present"),
        (("max_position_embeddings",), {}, BAICHUAN2_7B, "hidden_size = 4096"),
        (("max_position_embeddings",), SIZES_13B, BAICHUAN2_13B, "max_position_embeddings is absent"),
        ((), SIZES_13B | {"position_embedding": "alibi"}, BAICHUAN2_13B, None),
        (
            ("model_max_length",),
            {"architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000},
            dataclasses.replace(BAICHUAN2_7B, vocab_size=64000, normalize_head=False),
            "BaiChuanForCausalLM, so spelt, is Baichuan 1",
        ),
        (
            ("max_position_embeddings",),
            SIZES_13B | {"vocab_size": 64000},
            dataclasses.replace(BAICHUAN2_13B, vocab_size=64000, normalize_head=False),
            "vocab_size = 64000",
        ),
        (
            (),
            {"vocab_size": 64000, "normalize_head": True, "rope_theta": 5e5},
            dataclasses.replace(BAICHUAN2_7B, vocab_size=64000, rope_theta=5e5),
            None,
        ),
    ],
)
def test_released_configs(tmp_path, caplog, without, changes, expected, reason):
    with caplog.at_level(logging.INFO):
        config = hf.read_config(write_raw(tmp_path, without, **changes))
    assert config == dataclasses.replace(expected, z_loss_weight=0.0)
    if reason is not None:
        assert reason in caplog.text
    if "position_embedding" in changes:
        assert "position_embedding" not in caplog.text


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        ((), {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ((), {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ((), {"model_type": "llama"}, "model_type = 'llama' is not supported"),
        (("model_type",), {}, "model_type = None is not supported"),
        ((), {"num_key_value_heads": 8}, "num_key_value_heads = 8 is not supported"),
        ((), {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ((), {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ((), {"hidden_size": "4096"}, "hidden_size = '4096' is not valid: expected int"),
        ((), {"eos_token_id": [2]}, "expected int"),
        ((), {"num_attention_heads": 33}, "must divide hidden_size"),
        ((), {"position_embedding": "rotary"}, "legal values are rope, alibi"),
        (("vocab_size", "hidden_size"), {}, "has no hidden_size, vocab_size"),
    ],
)
def test_unsupported_configs(tmp_path, without, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        hf.read_config(write_raw(tmp_path, without, **changes))


def test_missing_and_broken_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        hf.read_config(tmp_path)


# -------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("name", "position"), [("rope-tiny", "rope"), ("alibi-tiny", "alibi")])
def test_golden_folders(tmp_path, name, position):
    config = hf.read_config(GOLDEN / name)
    assert (config.position_embedding, config.normalize_head, config.z_loss_weight) == (position, True, 2e-4)
    for file in (GOLDEN / name).glob("*.bin*"):
        shutil.copy(file, tmp_path)
    params = hf.load_params(GOLDEN / name, config)  # safetensors are there, so they are read
    assert {f.file.suffix for f in hf.open_folder(GOLDEN / name).values()} == {".safetensors"}
    assert {f.file.suffix for f in hf.open_folder(tmp_path).values()} == {".bin"}
    assert tree_bytes(hf.load_params(tmp_path, config)) == tree_bytes(params)
    assert {path: a.shape for path, a in table.flatten(params).items()} == table.param_shapes(config)


@pytest.mark.parametrize("layout", ["single", "shards", "index"])
def test_file_layouts(tmp_path, layout):
    tensors = tiny_tensors()
    names = list(tensors)
    halves = [{k: tensors[k] for k in part} for part in (names[:5], names[5:])]
    shards = {f"model-0000{i}-of-00002.safetensors": half for i, half in enumerate(halves, 1)}
    if layout == "single":
        write_tensors(tmp_path, {"model.safetensors": tensors})
    else:
        index = {name: file for file, half in shards.items() for name in half}
        write_tensors(tmp_path, shards, index if layout == "index" else None)
    assert tensor_bytes(tmp_path) == {name: (t.shape, t.dtype, t.tobytes()) for name, t in tensors.items()}


def test_inv_freq_is_skipped(tmp_path):
    tensors = tiny_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    write_tensors(tmp_path, {"model.safetensors": tensors}, None)
    assert hf.open_folder(tmp_path).keys() == table.torch_shapes(TINY).keys()


@pytest.mark.parametrize("file", ["../evil.safetensors", "/tmp/evil.safetensors", "a/b.safetensors", "..", "a.bin", ""])
def test_index_that_leaves_the_folder(tmp_path, file):
    folder = tmp_path / "model"
    tensors = tiny_tensors()
    write_tensors(tmp_path, {"evil.safetensors": tensors})
    write_tensors(folder, {}, dict.fromkeys(tensors, file))
    with pytest.raises(ValueError, match="expected \\*.safetensors files of its own folder"):
        hf.open_folder(folder)


def test_symbolic_links_are_followed(tmp_path):
    """The Hugging Face cache is made of them."""
    write_tensors(tmp_path, {"blob.safetensors": tiny_tensors()})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../blob.safetensors")
    hf.check_tensors(TINY, hf.open_folder(folder))


def test_incomplete_and_inconsistent_folders(tmp_path):
    tensors = tiny_tensors()
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    head = {"lm_head.weight": tensors["lm_head.weight"]}
    rest = {k: v for k, v in tensors.items() if k not in head}
    index = dict.fromkeys(rest, one) | dict.fromkeys(head, two)

    def refused(name: str, files: dict, index: dict | None, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            hf.open_folder(write_tensors(tmp_path / name, files, index))

    refused("shard", {one: rest}, index, f"incomplete: {two} not there")
    refused("shard without index", {one: rest}, None, f"incomplete: {two} not there")
    refused("duplicate", {one: tensors, two: head}, None, rf"lm_head\.weight is in {one} and in {two}")
    refused("elsewhere", {one: tensors, two: rest}, index, r"lm_head\.weight is in .*, the index says")
    refused("not in the index", {one: tensors}, dict.fromkeys(rest, one), r"lm_head\.weight is in .* but not in the")
    refused("not in the file", {one: rest}, dict.fromkeys(tensors, one), r"lm_head\.weight is in the index but not")
    refused("two sets", {one: rest, two: head, "model-00001-of-00003.safetensors": rest}, None, "different sets")
    refused("both", {"model.safetensors": tensors, one: rest, two: head}, index, "has both")
    refused("no map", {one: tensors}, {}, "no weight_map")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="neither"):
        hf.open_folder(tmp_path / "nothing")


def test_missing_extra_misshapen_tensors_are_listed(tmp_path):
    tensors = tiny_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((20, 16), np.float32)
    tensors["lm_head.weight"] = np.ones((25, 16), np.float32)
    write_tensors(tmp_path, {"model.safetensors": tensors})
    with pytest.raises(ValueError) as error:
        hf.load_params(tmp_path, TINY)
    for message in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.2.mlp.up_proj.weight is unexpected",
        "lm_head.weight has shape (25, 16), expected (24, 16)",
    ):
        assert message in str(error.value)


def test_wrong_dtypes_are_listed(tmp_path):
    tensors = tiny_tensors(np.int64)
    late = {"model.layers.1.mlp.up_proj.weight": tensors.pop("model.layers.1.mlp.up_proj.weight").astype(np.float16)}
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": late}
    with pytest.raises(ValueError) as error:
        hf.load_params(write_tensors(tmp_path, files), TINY)
    assert "model.embed_tokens.weight has dtype int64, expected one of bfloat16" in str(error.value)
    assert "up_proj.weight has dtype float16, in the layers before it is int64" in str(error.value)


# -------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [1, 3000, 5e9])
def test_round_trips_keep_every_byte(tmp_path, dtype, shard_bytes):
    params = random_params(TINY, DTYPES[dtype])
    hf.save_folder(params, TINY, tmp_path / "a", dtype, shard_bytes)
    assert hf.read_config(tmp_path / "a") == TINY
    loaded = hf.load_params(tmp_path / "a", TINY)
    assert tree_bytes(loaded) == tree_bytes(params)
    hf.save_folder(loaded, TINY, tmp_path / "b", dtype)
    assert tensor_bytes(tmp_path / "b") == tensor_bytes(tmp_path / "a")


@pytest.mark.parametrize("name", ["rope-tiny", "alibi-tiny"])
def test_golden_round_trip(tmp_path, name):
    config = hf.read_config(GOLDEN / name)
    hf.save_folder(hf.load_params(GOLDEN / name, config), config, tmp_path / "a", "float32")
    assert tensor_bytes(tmp_path / "a") == tensor_bytes(GOLDEN / name)


def test_what_is_written(tmp_path):
    tokenizer = tmp_path / "spm.model"
    tokenizer.write_bytes(b"pieces")
    hf.save_folder(
        random_params(TINY, np.float32), TINY, tmp_path / "a", max_shard_bytes=3000, tokenizer_path=tokenizer
    )
    folder = tmp_path / "a"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert list(index["weight_map"]) == list(table.torch_shapes(TINY))
    assert index["metadata"]["total_size"] == 2 * TINY.num_parameters()
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert {f.name for f in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.model", "model.safetensors.index.json", *shards,
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
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == json.loads((GOLDEN / "rope-tiny" / "generation_config.json").read_text())


def test_alibi_has_no_max_position_embeddings(tmp_path):
    """Other engines would take its presence for RoPE."""
    hf.write_config(dataclasses.replace(TINY, position_embedding="alibi"), tmp_path)
    assert "max_position_embeddings" not in json.loads((tmp_path / "config.json").read_text())


def test_casts_round_to_nearest(tmp_path):
    params = random_params(TINY, np.float32)
    hf.save_folder(params, TINY, tmp_path / "a", "bfloat16")
    loaded = table.flatten(hf.load_params(tmp_path / "a", TINY))
    for path, array in table.flatten(params).items():
        assert loaded[path].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()


def test_float16_overflow_names_the_tensor_and_leaves_nothing(tmp_path):
    params = random_params(TINY, np.float32)
    params["layers"]["mlp"]["down_proj"]["weight"][1, 0, 0] = 70000
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight overflows in float16.*70000"):
        hf.save_folder(params, TINY, tmp_path / "a", "float16")
    assert list(tmp_path.iterdir()) == []
    params["layers"]["mlp"]["down_proj"]["weight"][1, 0, 0] = np.inf  # was there before the cast
    hf.save_folder(params, TINY, tmp_path / "a", "float16")


def test_sharded_jax_arrays(tmp_path):
    params = random_params(TINY, ml_dtypes.bfloat16)
    devices = np.array(jax.devices()[: math.gcd(len(jax.devices()), 4)])
    mesh = jax.sharding.Mesh(devices, ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))

    def shard(array: np.ndarray) -> jax.Array:
        spec = [None] * array.ndim
        spec[-1] = "fsdp"
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    hf.save_folder(params, TINY, tmp_path / "a")
    hf.save_folder(jax.tree.map(shard, params), TINY, tmp_path / "b")
    assert tensor_bytes(tmp_path / "a") == tensor_bytes(tmp_path / "b")


def test_params_that_do_not_fit(tmp_path):
    params = random_params(TINY, np.float32)
    del params["norm"]
    params["bias"] = np.ones(3)
    params["lm_head"]["weight"] = np.ones((16, 24))
    message = r"norm\.weight is missing; bias is unexpected; lm_head\.weight has shape \(16, 24\), expected \(24, 16\)"
    with pytest.raises(ValueError, match=message):
        hf.save_folder(params, TINY, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_existing_target(tmp_path):
    folder = tmp_path / "a"
    first, second = random_params(TINY, np.float32, 1), random_params(TINY, np.float32, 2)
    hf.save_folder(first, TINY, folder, "float32")
    with pytest.raises(FileExistsError, match="exists; pass overwrite"):
        hf.save_folder(second, TINY, folder, "float32")
    assert tree_bytes(hf.load_params(folder, TINY)) == tree_bytes(first)
    hf.save_folder(second, TINY, folder, "float32", overwrite=True)
    assert tree_bytes(hf.load_params(folder, TINY)) == tree_bytes(second)
    assert list(tmp_path.iterdir()) == [folder]


def test_overwrite_never_deletes_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a folder with a config"):
        hf.save_folder(random_params(TINY, np.float32), TINY, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


class Interrupted:
    """A parameter whose third layer cannot be read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

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
        hf.save_folder(broken, TINY, folder, "float32", max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []
    hf.save_folder(params, TINY, folder, "float32")
    with pytest.raises(KeyboardInterrupt):
        hf.save_folder(broken, TINY, folder, "float32", overwrite=True)
    assert list(tmp_path.iterdir()) == [folder]
    assert tree_bytes(hf.load_params(folder, TINY)) == tree_bytes(params)


def test_what_a_killed_run_left_is_replaced(tmp_path):
    stale = tmp_path / ".a.partial"
    stale.mkdir()
    (stale / "model-00001-of-00009.safetensors").write_bytes(b"half")
    hf.save_folder(random_params(TINY, np.float32), TINY, tmp_path / "a")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    hf.check_tensors(TINY, hf.open_folder(tmp_path / "a"))
