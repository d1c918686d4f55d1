"""Reading a PyTorch folder: layouts of files, and everything that is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from bc2_jax.convert import hf, table
from bc2_jax.convert.hf_config import read_config
from tests.convert.models import GOLDEN, TINY, read_params, tensor_bytes, tiny_tensors, tree_bytes, write_tensors


@pytest.mark.parametrize(("name", "position"), [("rope-tiny", "rope"), ("alibi-tiny", "alibi")])
def test_golden_folders(tmp_path, name, position):
    config = read_config(GOLDEN / name)
    assert (config.position_embedding, config.normalize_head, config.z_loss_weight) == (position, True, 2e-4)
    for file in (GOLDEN / name).glob("*.bin*"):
        shutil.copy(file, tmp_path)
    params = read_params(GOLDEN / name, config)  # safetensors are there, so they are read
    assert {f.file.suffix for f in hf.open_folder(GOLDEN / name).values()} == {".safetensors"}
    assert {f.file.suffix for f in hf.open_folder(tmp_path).values()} == {".bin"}
    assert tree_bytes(read_params(tmp_path, config)) == tree_bytes(params)
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

    refused("shard", {one: rest}, index, f"incomplete: it lacks {two}")
    refused("shard without index", {one: rest}, None, f"incomplete: it lacks {two}")
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
        read_params(tmp_path, TINY)
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
        read_params(write_tensors(tmp_path, files), TINY)
    assert "model.embed_tokens.weight has dtype int64, expected one of bfloat16" in str(error.value)
    assert "model.layers.0.mlp.up_proj.weight has dtype int64" in str(error.value)
    assert "layers.1.mlp.up_proj" not in str(error.value)
