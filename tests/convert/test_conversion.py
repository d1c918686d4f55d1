"""Conversions there and back: every byte kept, every fault found, nothing half-done under a final name."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bc2_jax
from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf, orbax, pretrained, table
from bc2_jax.convert.conversion import Options, to_hf, to_orbax
from bc2_jax.convert.hf_config import read_config, read_json, write_json
from bc2_jax.convert.source import open_source
from bc2_jax.metadata import read_metadata
from bc2_jax.model.baichuan import init_params
from bc2_jax.train.metrics import fingerprint
from tests.convert.models import (
    DTYPES,
    GOLDEN,
    TINY,
    array_bytes,
    random_folder,
    random_params,
    read_params,
    tensor_bytes,
)
from tests.faults import preloaded

ALIBI = dataclasses.replace(TINY, position_embedding="alibi", num_attention_heads=2, num_hidden_layers=3)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(3, 40)),
    st.sampled_from(["rope", "alibi"]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(["safetensors", "bin"]),
    st.sampled_from([1.0, 2000.0, 5e9]),
)
@settings(max_examples=12)
def test_there_and_back_keeps_every_byte(tmp_path_factory, sizes, position, dtype, file_format, shard_bytes):
    heads, half, ffn, layers, vocab = sizes
    config = ModelConfig(
        hidden_size=heads * 2 * half, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        position_embedding=position, vocab_size=vocab,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("there")
    random_folder(root / "a", config, dtype, file_format=file_format, max_shard_bytes=shard_bytes)
    there = to_orbax(root / "a", root / "b", Options(verify=True))
    back = to_hf(root / "b", root / "c", Options(verify=True), dtype, "baichuan2", file_format, shard_bytes)
    assert tensor_bytes(root / "c") == tensor_bytes(root / "a")
    assert read_config(root / "c") == config
    assert there.fingerprint == back.fingerprint
    assert there.hashed_files == len(list((root / "a").glob("*model-*")))
    again = to_orbax(root / "c", root / "d")
    assert array_bytes(root / "d") == array_bytes(root / "b")
    assert again.fingerprint == there.fingerprint


@pytest.mark.parametrize("name", ["rope-tiny", "alibi-tiny"])
def test_golden_in_both_formats(tmp_path, name):
    folder = tmp_path / "bin"
    folder.mkdir()
    for file in (GOLDEN / name).iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).symlink_to(file)
    a, b = to_orbax(GOLDEN / name, tmp_path / "a"), to_orbax(folder, tmp_path / "b")
    params = read_params(GOLDEN / name, read_config(GOLDEN / name))
    # The same as a training run prints for these parameters.
    assert a.fingerprint == b.fingerprint == fingerprint(jax.tree.map(jax.numpy.asarray, params))
    # generation_config.json comes back as it was.
    to_hf(tmp_path / "b", tmp_path / "c", dtype="float32")
    assert read_json(tmp_path / "c" / "generation_config.json") == read_json(folder / "generation_config.json")
    assert tensor_bytes(tmp_path / "c") == tensor_bytes(folder)


def test_from_a_sharded_checkpoint_and_onto_another_mesh(tmp_path, mesh_of):
    config = dataclasses.replace(TINY, vocab_size=32)
    params = init_params(config, 3, mesh_of(2, 2, 2))
    pretrained.save_params(params, config, tmp_path / "a")
    done = to_hf(tmp_path / "a", tmp_path / "b", dtype="float32", layout="baichuan2")
    assert done.fingerprint == fingerprint(params)
    to_orbax(tmp_path / "b", tmp_path / "c")
    loaded, found = pretrained.load_params(tmp_path / "c", mesh=mesh_of(1, 2, 4))
    assert found == config
    assert fingerprint(loaded) == fingerprint(params)
    q = loaded["layers"]["self_attn"]["q_proj"]["weight"]
    assert q.addressable_shards[0].data.shape == (2, 8, 1, 4)


def test_layers_of_a_checkpoint_are_chunks_of_their_own(tmp_path, mesh_of, monkeypatch):
    pretrained.save_params(init_params(ALIBI, 0, mesh_of(1, 2, 1)), ALIBI, tmp_path / "a")
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 512)
    to_orbax(tmp_path / "a", tmp_path / "b")
    for path in "ab":
        for name, array in orbax.open_arrays(tmp_path / path).items():
            if name.startswith("layers."):
                assert array.chunk_layout.read_chunk.shape[0] == 1, name
    assert max(file.stat().st_size for file in (tmp_path / "b" / "params").glob("*/c/**/*") if file.is_file()) <= 516
    assert array_bytes(tmp_path / "a") == array_bytes(tmp_path / "b")


@pytest.mark.parametrize("layout", ["baichuan1", "llama"])
def test_layouts_with_a_normalised_head_give_the_same_logits(tmp_path, layout):
    to_hf(GOLDEN / "rope-tiny", tmp_path / "a", Options(verify=True), "float32", layout)
    raw = read_json(tmp_path / "a" / "config.json")
    tensors = {name: tensor.read() for name, tensor in hf.open_folder(tmp_path / "a").items()}
    norms = np.linalg.norm(tensors["lm_head.weight"], axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    if layout == "llama":
        assert raw["architectures"] == ["LlamaForCausalLM"] and raw["num_key_value_heads"] == 4
        fused = hf.open_folder(GOLDEN / "rope-tiny")["model.layers.1.self_attn.W_pack.weight"].read()
        parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(parts), fused)
        return
    ids = np.arange(40).reshape(2, 20)
    ours, exported = bc2_jax.load_pretrained(GOLDEN / "rope-tiny"), bc2_jax.load_pretrained(tmp_path / "a")
    assert ours.config.normalize_head and not exported.config.normalize_head
    np.testing.assert_allclose(exported(ids), ours(ids), atol=2e-5)


def test_llama_is_refused_for_alibi(tmp_path):
    with pytest.raises(ValueError, match=r"layout = 'llama' is not valid .* LlamaForCausalLM has no ALiBi"):
        to_hf(GOLDEN / "alibi-tiny", tmp_path / "a", layout="llama")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_named_or_refused(tmp_path):
    source = random_folder(tmp_path / "a")
    flip(
        source / "model-00001-of-00001.safetensors", hf.open_folder(source), "model.layers.1.mlp.up_proj.weight", np.nan
    )
    (source / "SHA256SUMS").unlink()
    assert to_orbax(source, tmp_path / "b").not_finite == ("layers.mlp.up_proj.weight[1]",)
    assert to_hf(tmp_path / "b", tmp_path / "c", dtype="float32").not_finite == ("layers.mlp.up_proj.weight[1]",)
    with pytest.raises(ValueError, match=r"layers\.mlp\.up_proj\.weight\[1\] has values that are not finite"):
        to_orbax(source, tmp_path / "d", Options(strict=True))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c"]


def flip(file: Path, tensors: dict, name: str, value: float) -> None:
    with file.open("r+b") as handle:
        handle.seek(tensors[name].offset)
        handle.write(np.float32(value).tobytes())


@given(st.data())
@settings(max_examples=15)
def test_one_flipped_bit_in_a_checkpoint_is_found(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("bit")
    to_orbax(random_folder(root / "a"), root / "b")
    chunks = sorted(file for file in (root / "b" / "params").glob("*/c/**/*") if file.is_file())
    file = data.draw(st.sampled_from(chunks))
    flip_bit(file, data.draw(st.integers(0, 8 * file.stat().st_size - 1)))
    with pytest.raises(ValueError, match=r"damaged: [\w.]+ cannot be read \(.*[Dd]igest"):
        to_hf(root / "b", root / "c")
    with pytest.raises(ValueError, match="is damaged: it cannot be read"):
        pretrained.load_params(root / "b")
    file.unlink()
    with pytest.raises(ValueError, match=r"damaged: [\w.]+ cannot be read"):
        to_hf(root / "b", root / "c")
    assert not (root / "c").exists()


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@given(data=st.data())
@settings(max_examples=10)
def test_one_flipped_bit_in_a_folder_is_found(tmp_path_factory, file_format, data):
    root = tmp_path_factory.mktemp("bit")
    source = random_folder(root / "a", file_format=file_format)
    (file,) = source.glob(f"*.{file_format}")
    flip_bit(file, data.draw(st.integers(0, 8 * file.stat().st_size - 1)))
    with pytest.raises((ValueError, FileNotFoundError)):
        to_orbax(source, root / "b")
    assert sorted(path.name for path in root.iterdir()) == ["a"]


def flip_bit(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_does_not_run(tmp_path):
    source = random_folder(tmp_path / "a", file_format="bin")
    (file,) = source.glob("*.bin")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model.norm.weight": Attack(tmp_path / "owned")}, 2))
    (source / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"asks for posix\.system"):
        to_orbax(source, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# At its n-th read, its rename, or the writing of the index, the process is killed as kill -9 does.
KILLED = """
import itertools, os, pathlib, signal, sys
from bc2_jax.convert import conversion, stream
point, command, source, target = int(sys.argv[1]), *sys.argv[2:]
count = itertools.count()
def counted(function):
    def call(*args):
        if next(count) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
stream.Stream.read = counted(stream.Stream.read)
pathlib.Path.rename = counted(pathlib.Path.rename)
convert = conversion.to_orbax if command == "to-orbax" else conversion.to_hf
convert(source, target, conversion.Options(overwrite=True))
print("finished")
"""


@pytest.mark.parametrize("command", ["to-orbax", "to-hf"])
def test_a_killed_conversion_can_be_run_again(tmp_path, command):
    convert = to_orbax if command == "to-orbax" else to_hf
    source, target = random_folder(tmp_path / "a", ALIBI), tmp_path / "b"
    whole = convert(source, tmp_path / "whole")
    reads = len(list(open_source(source).parts()))
    program = tmp_path.with_name(f"{tmp_path.name}.py")
    program.write_text(KILLED)
    # A new target at first; from then on an old one is being replaced.
    for point in (0, reads // 2, reads - 1, reads, reads + 1, reads + 2):
        log = tmp_path.with_name(f"{tmp_path.name}.{point}.log")
        args = [str(program), str(point), command, str(source), str(target)]
        done = preloaded.Program(args, dict(os.environ), log)
        assert done.wait() == -signal.SIGKILL or log.read_text().endswith("finished\n"), log.read_text()
        if target.exists():  # what has the final name is always whole
            assert array_bytes(target) == array_bytes(tmp_path / "whole")
        if point == reads - 1:
            assert not target.exists()
            assert convert(source, target).fingerprint == whole.fingerprint
    assert convert(source, target, Options(overwrite=True)).fingerprint == whole.fingerprint
    assert array_bytes(target) == array_bytes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "whole"]


def test_targets_that_exist(tmp_path):
    source = random_folder(tmp_path / "a")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    for convert in (to_orbax, to_hf):
        with pytest.raises(FileExistsError, match="pass --overwrite"):
            convert(source, tmp_path / "thesis")
        with pytest.raises(FileExistsError, match="not replaced"):
            convert(source, tmp_path / "thesis", Options(overwrite=True))
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    # A run has a config.json too, and its training checkpoints can't be made again.
    run = tmp_path / "run"
    (run / "checkpoints" / "8" / "params").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for name in ("opt_state", "_CHECKPOINT_METADATA"):
        (run / "checkpoints" / "8" / name).touch()
    for convert, target in ((to_hf, run), (to_orbax, run / "checkpoints" / "8")):
        with pytest.raises(FileExistsError, match="not replaced"):
            convert(source, target, Options(overwrite=True))
    to_orbax(source, tmp_path / "b")
    to_orbax(random_folder(tmp_path / "c", seed=1), tmp_path / "b", Options(overwrite=True))
    assert array_bytes(tmp_path / "b") == array_bytes(tmp_path / "c")


def test_baichuan_1(tmp_path):
    source = random_folder(tmp_path / "a")
    raw = read_json(source / "config.json")
    del raw["normalize_head"]
    write_json(source / "config.json", raw | {"architectures": ["BaiChuanForCausalLM"]})
    (source / "SHA256SUMS").unlink()
    done = to_orbax(source, tmp_path / "b")
    assert not done.config.normalize_head
    # A plain head is never normalised, in no layout.
    to_hf(tmp_path / "b", tmp_path / "c", dtype="float32", layout="baichuan1")
    assert tensor_bytes(tmp_path / "c") == tensor_bytes(source)
    assert read_json(tmp_path / "c" / "config.json")["architectures"] == ["BaiChuanForCausalLM"]


def test_casts_to_another_dtype(tmp_path):
    source = random_folder(tmp_path / "a")
    to_orbax(source, tmp_path / "b", dtype="bfloat16")
    there, here = open_source(tmp_path / "b"), open_source(source)
    for part in here.parts():
        np.testing.assert_array_equal(there.read(*part), here.read(*part).astype(DTYPES["bfloat16"]))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_dtype_of_the_source_is_kept_unless_told(tmp_path, dtype):
    source = random_folder(tmp_path / "a", dtype=dtype)
    to_orbax(source, tmp_path / "b")
    for path in (source, tmp_path / "b"):
        done = to_hf(path, tmp_path / f"of-{path.name}")
        assert tensor_bytes(done.target) == tensor_bytes(source) and done.notes == ()
        assert read_json(done.target / "config.json")["torch_dtype"] == dtype
    (tmp_path / "b" / "opt_state").mkdir()  # of a training run
    done = to_hf(tmp_path / "b", tmp_path / "d")
    assert {tensor.dtype.name for tensor in hf.open_folder(done.target).values()} == {"bfloat16"}
    told = ("written as bfloat16, as models are released; --dtype float32 keeps the master weights of the run",)
    assert done.notes == (() if dtype == "bfloat16" else told)


def test_several_dtypes_become_one_that_holds_them(tmp_path):
    params = random_params(TINY, DTYPES["bfloat16"])
    params["norm"]["weight"] = params["norm"]["weight"].astype(np.float16)
    pretrained.save_params(params, TINY, tmp_path / "a")
    done = to_hf(tmp_path / "a", tmp_path / "b")
    assert done.notes == ("written as float32, which holds the source's bfloat16, float16 exactly",)
    there, here = open_source(tmp_path / "b"), open_source(tmp_path / "a")
    for part in here.parts():
        np.testing.assert_array_equal(there.read(*part), here.read(*part).astype(np.float32))


@pytest.mark.parametrize("convert", [to_orbax, to_hf])
def test_what_is_not_carried_over_is_named(tmp_path, convert):
    source = random_folder(tmp_path / "a", max_shard_bytes=2000.0)
    assert convert(source, tmp_path / "b").notes == ()
    (source / "adapter").mkdir()
    (source / ".gitattributes").touch()
    others = ("adapter_model.safetensors", "modeling_baichuan.py", "pytorch_model.bin", "tokenizer_config.json")
    for name in others:
        (source / name).touch()
    done = convert(source, tmp_path / "c")
    assert done.notes == ("not carried over: adapter/; " + "; ".join(others),)
    checkpoint = tmp_path / "d"
    to_orbax(tmp_path / "b", checkpoint)
    (checkpoint / "lora.npz").touch()
    (checkpoint / "opt_state").mkdir()
    (checkpoint / "opt_state" / "_METADATA").touch()
    assert convert(checkpoint, tmp_path / "e").notes[-1] == "not carried over: lora.npz"


def test_parameters_that_overflow(tmp_path):
    params = random_params(TINY, np.float32)
    params["layers"]["mlp"]["down_proj"]["weight"][1, 2, 3] = -1e6
    pretrained.save_params(params, TINY, tmp_path / "a")
    message = r"layers\.mlp\.down_proj\.weight\[1\] overflows in float16: it has the value 1e\+06; use bfloat16"
    with pytest.raises(ValueError, match=message):
        to_hf(tmp_path / "a", tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()


def test_a_table_that_loses_an_array_is_noticed(tmp_path):
    to_orbax(random_folder(tmp_path / "a"), tmp_path / "b")
    fewer = {path: shape for path, shape in table.param_shapes(TINY).items() if path != "norm.weight"}
    arrays = {path: (shape, np.dtype(np.float32)) for path, shape in fewer.items()}
    read = open_source(tmp_path / "b").read
    orbax.write_params(tmp_path / "c", arrays, read_metadata(tmp_path / "b"), read)
    with pytest.raises(ValueError, match=r"norm\.weight is missing"):
        open_source(tmp_path / "c")
