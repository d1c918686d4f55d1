"""inspect and diff against models whose differences are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bc2_jax.convert import hf, pretrained, table
from bc2_jax.convert.conversion import to_hf, to_orbax
from bc2_jax.convert.hf_config import read_json, write_config, write_json
from bc2_jax.convert.report import diff, inspect
from tests.convert.models import GOLDEN, TINY, random_folder, random_params, tiny_tensors, write_tensors


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
    assert found.missing == ("model.layers.1.mlp.up_proj.weight",)
    assert found.unexpected == ("model.extra",)
    assert found.misshapen == ("lm_head.weight (20, 16), expected (24, 16)",)
    assert not found.is_consistent and found.head_norms == (4.0, 4.0, 4.0)


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
