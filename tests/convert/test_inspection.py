"""inspect and diff against models whose differences are known."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bc2_jax.convert import hf, pretrained, table
from bc2_jax.convert.conversion import Options, to_hf, to_orbax
from bc2_jax.convert.hf_config import read_json, write_config, write_json
from bc2_jax.convert.inspection import diff, inspect
from tests.convert.models import GOLDEN, TINY, random_folder, random_params, tiny_tensors, write_by_dtype, write_tensors


@pytest.mark.parametrize(
    ("name", "reason"), [("rope-tiny", "max_position_embeddings = 96"), ("alibi-tiny", "is absent")]
)
def test_inspect_a_folder(name, reason, tmp_path):
    found = inspect(GOLDEN / name)
    assert found.format == "PyTorch, safetensors"
    assert found.is_consistent and found.parameters == found.config.num_parameters()
    assert found.bytes == 4 * found.parameters
    assert reason in found.why[0] and "NormHead" in found.why[1]
    assert found.head.startswith("master rows")
    packed = next(group for group in found.groups if "W_pack" in group.name)
    width = found.config.hidden_size
    assert packed.name == "model.layers.{}.self_attn.W_pack.weight"
    assert (packed.count, packed.shape, packed.dtype) == (2, (3 * width, width), "float32")
    rows = hf.open_folder(GOLDEN / name)["lm_head.weight"].read()
    np.testing.assert_allclose(found.head_norms[1], np.linalg.norm(rows, axis=1).mean(), rtol=1e-6)
    to_hf(GOLDEN / name, tmp_path / "a", layout="baichuan1")
    assert inspect(tmp_path / "a").head.startswith("normalised rows")


def test_inspect_a_checkpoint(tmp_path):
    to_orbax(GOLDEN / "alibi-tiny", tmp_path / "a", dtype="bfloat16")
    found = inspect(tmp_path / "a")
    assert found.format == "Orbax, parameters only" and found.is_consistent
    assert found.bytes == 2 * found.parameters
    assert {group.dtype for group in found.groups} == {"bfloat16"}


def test_inspect_names_what_does_not_fit(tmp_path):
    tensors = tiny_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = np.ones((20, 16), np.float32)
    folder = write_tensors(tmp_path / "a", {"model.safetensors": tensors})
    write_config(TINY, folder)
    found = inspect(folder)
    assert found.missing == ["model.layers.1.mlp.up_proj.weight"]
    assert found.unexpected == ["model.extra"]
    assert found.misshapen == ["lm_head.weight has shape (20, 16), expected (24, 16)"]
    assert not found.is_consistent and found.head_norms == (4.0, 4.0, 4.0)


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """The weights of a folder, changed."""
    tensors = change({name: tensor.read() for name, tensor in hf.open_folder(folder).items()})
    for file in folder.glob("model*"):
        file.unlink()
    write_by_dtype(folder, tensors)


def edit(folder: Path, **keys) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | keys)


def drop(folder: Path, *keys: str) -> None:
    raw = read_json(folder / "config.json")
    write_json(folder / "config.json", {key: value for key, value in raw.items() if key not in keys})


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.W_pack.weight"
HARMLESS = {
    "nothing": lambda f: None,
    "pad null": lambda f: edit(f, pad_token_id=None, rms_norm_eps="1e-06", model_max_length=4096.0),
    "default rope": lambda f: edit(f, rope_scaling={"rope_type": "default"}),
    "buffers": lambda f: rewrite(f, lambda t: t | {"model.rotary_emb.inv_freq": np.array([1, 0.01], np.float32)}),
    "fp64": lambda f: rewrite(f, lambda t: {name: a.astype(np.float64) for name, a in t.items()}),
    "bf16": lambda f: rewrite(f, lambda t: {name: a.astype(ml_dtypes.bfloat16) for name, a in t.items()}),
    "other frequencies": lambda f: rewrite(f, lambda t: t | {"model.rotary_emb.inv_freq": np.ones(2, np.float32)}),
    "a step number": lambda f: rewrite(f, lambda t: t | {"global_step": np.array(7)}),
    "an empty adapter beside it": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
}
BROKEN = {
    "unexpected": lambda f: rewrite(f, lambda t: t | {"model.extra.weight": t[NORM]}),
    "misshapen": lambda f: rewrite(f, lambda t: t | {NORM: t[NORM][:3]}),
    "a head of one dimension": lambda f: rewrite(f, lambda t: t | {"lm_head.weight": t[NORM]}),
    "an empty head": lambda f: rewrite(f, lambda t: t | {"lm_head.weight": np.zeros((0, 16), np.float32)}),
    "integers": lambda f: rewrite(f, lambda t: {name: a.astype(np.int8) for name, a in t.items()}),
    "adapter": lambda f: rewrite(f, lambda t: t | {"model.layers.0.mlp.up_proj.lora_A.weight": t[NORM]}),
    "half split": lambda f: rewrite(f, lambda t: t | {Q.replace("W_pack", "q_proj"): t[Q][:16]}),
    "grouped queries": lambda f: edit(f, num_key_value_heads=2),
    "scaled rope": lambda f: edit(f, rope_scaling={"rope_type": "linear", "factor": 2}),
    "two thetas": lambda f: edit(f, rope_theta=1e6, rope_parameters={"rope_theta": 1e4}),
    "unknown key": lambda f: edit(f, attention_of_the_future=1),
    "huge": lambda f: edit(f, hidden_size=10**12),
    "no size": lambda f: drop(f, "hidden_size"),
    "another model": lambda f: edit(f, model_type="gpt2"),
    "unclear positions": lambda f: [drop(f, "position_embedding"), edit(f, num_hidden_layers=40)],
    "layers": lambda f: edit(f, num_hidden_layers=3),
    "vocabulary": lambda f: edit(f, vocab_size=640),
    "tokenizer": lambda f: shutil.copyfile(TOKENIZER_OF_TESTS[0], f / "tokenizer.model"),
    "no tokenizer": lambda f: (f / "tokenizer.model").write_bytes(b"pieces"),
    "generation config": lambda f: (f / "generation_config.json").write_text("{"),
    "missing": lambda f: rewrite(f, lambda t: {name: a for name, a in t.items() if name != NORM}),
    "no head at all": lambda f: rewrite(f, lambda t: {n: a for n, a in t.items() if n != "lm_head.weight"}),
    "prefix": lambda f: rewrite(f, lambda t: {f"module.{name}": a for name, a in t.items()}),
    "no weights": lambda f: [file.unlink() for file in f.glob("model*")],
    "damaged": lambda f: next(f.glob("model-*")).write_bytes(b"damaged"),
    "config": lambda f: (f / "config.json").write_text("[]"),
}
TOKENIZER_OF_TESTS: list[Path] = []


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(HARMLESS | BROKEN)), min_size=1, max_size=3, unique=True))
@example(["prefix"]).via("one of the reported cases")
def test_the_verdict_is_that_of_a_conversion(tokenizer, tmp_path_factory, names):
    """Whatever is odd or wrong with a folder: inspect says what to-orbax says, in the same words."""
    TOKENIZER_OF_TESTS[:] = [tokenizer.path]
    folder = random_folder(tmp_path_factory.mktemp("verdict") / "a")
    for name in sorted(names, key=[*HARMLESS, *BROKEN].index):  # none can undo another
        (HARMLESS | BROKEN)[name](folder)
    assert_same_verdict(folder, is_broken=any(name in BROKEN for name in names))


@pytest.mark.parametrize("name", sorted(HARMLESS | BROKEN))
def test_the_verdict_on_each(tokenizer, tmp_path, name):
    TOKENIZER_OF_TESTS[:] = [tokenizer.path]
    folder = random_folder(tmp_path / "a")
    (HARMLESS | BROKEN)[name](folder)
    assert_same_verdict(folder, is_broken=name in BROKEN)


def assert_same_verdict(folder: Path, is_broken: bool) -> None:
    options = Options(check_hashes=False)
    try:
        to_orbax(folder, folder.with_name("out"), options)
        conversion = None
    except (OSError, ValueError) as error:
        conversion = str(error)
    try:
        verdict = inspect(folder, options).refusal
    except (OSError, ValueError) as error:
        verdict = str(error)
    assert verdict == conversion and (verdict is not None) == is_broken


def test_known_models_are_named(tmp_path):
    folder = random_folder(tmp_path / "a")
    raw = read_json(folder / "config.json")
    sizes = {"hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 40}
    write_json(folder / "config.json", raw | sizes | {"position_embedding": "alibi"})
    assert inspect(folder).model == "Baichuan 2 13B"
    write_json(folder / "config.json", raw | sizes | {"position_embedding": "alibi", "normalize_head": False})
    assert inspect(folder).model == "Baichuan 1 13B"
    assert "config.json says so" in inspect(folder).why[0]


def test_diff_of_equal_models(tmp_path):
    to_orbax(GOLDEN / "rope-tiny", tmp_path / "a")
    advanced: list[int] = []
    found = diff(GOLDEN / "rope-tiny", tmp_path / "a", advanced.append)
    assert found.is_same and found.total == 12
    assert sum(advanced) == 4 * inspect(tmp_path / "a").parameters


def test_diff_says_where_and_how_much(tmp_path):
    first, second = random_params(TINY, np.float32), random_params(TINY, np.float32)
    second["layers"]["mlp"]["gate_proj"]["weight"][1, 2, 3] += 0.5
    second["norm"]["weight"][0] = np.nan
    second["lm_head"]["weight"][5] = -second["lm_head"]["weight"][5]
    second["lm_head"]["weight"][6] = 0.0
    first["lm_head"]["weight"][6] = -0.0  # equal in value, not in bits
    pretrained.save_params(first, TINY, tmp_path / "a")
    pretrained.save_params(second, dataclasses.replace(TINY, z_loss_weight=0.0), tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found.is_same and found.fields == ("z_loss_weight: 0.0002 against 0.0",)
    arrays = {array.path: array for array in found.arrays}
    assert set(arrays) == {"layers.mlp.gate_proj.weight", "norm.weight", "lm_head.weight"}
    gate = arrays["layers.mlp.gate_proj.weight"]
    assert gate.layers == (1,)
    assert gate.max_abs == pytest.approx(0.5, rel=1e-6)
    assert gate.max_rel == pytest.approx(0.5 / np.abs(first["layers"]["mlp"]["gate_proj"]["weight"][1]).max(), rel=1e-6)
    assert arrays["norm.weight"].max_abs == np.inf
    assert arrays["lm_head.weight"].max_abs == pytest.approx(2 * np.abs(first["lm_head"]["weight"][5]).max())


def test_diff_of_other_dtypes_and_shapes(tmp_path):
    params = random_params(TINY, np.float32)
    pretrained.save_params(params, TINY, tmp_path / "a")
    to_orbax(tmp_path / "a", tmp_path / "b", dtype="bfloat16")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert len(found.arrays) == len(table.TABLE)
    assert all(array.dtypes == ("float32", "bfloat16") and array.max_rel < 2**-8 for array in found.arrays)
    with pytest.raises(ValueError, match="different shapes .*hidden_size: 16 against 48"):
        diff(tmp_path / "a", GOLDEN / "rope-tiny")
