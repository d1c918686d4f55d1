"""The options of tools/convert.py for folders that leave something open: to-orbax and inspect take and say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.config import ModelConfig
from bc2_jax.convert import hf
from bc2_jax.convert.pretrained import find_model
from tests.convert.models import GOLDEN, write_by_dtype
from tests.programs import load_program

tool = load_program("convert")


def make_folder(folder: Path, golden: str, prefix: str = "", **keys) -> Path:
    """A golden model under other names of tensors, with other keys."""
    folder.mkdir()
    raw = json.loads((GOLDEN / golden / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))
    tensors = hf.open_folder(GOLDEN / golden).items()
    return write_by_dtype(folder, {prefix + name: np.array(tensor.read()) for name, tensor in tensors})


CASES = [
    ("alibi-tiny", {"max_position_embeddings": 96}, ("--position-embedding", "alibi"), {}),
    ("alibi-tiny", {"max_position_embeddings": 96}, ("--position-embedding", "rope"), {"position_embedding": "rope"}),
    ("rope-tiny", {"prefix": "module."}, ("--strip-prefix", "module."), {}),
    ("rope-tiny", {"gate_of_mine": 7}, ("--ignore-key", "gate_of_mine"), {}),
    ("rope-tiny", {"norm_a": 7, "norm_b": 7}, ("--ignore-key", "norm_a", "--ignore-key", "norm_b"), {}),
    (
        "rope-tiny", {"architectures": ["BaiChuanForCausalLM"], "vocab_size": 125_696},
        ("--no-normalize-head",), None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("golden", "changes", "options", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_each_option_decides(tmp_path, capsys, golden, changes, options, expected):
    folder, target = make_folder(tmp_path / "a", golden, **changes), tmp_path / "b"
    said = []
    for command in (["inspect", str(folder)], ["to-orbax", str(folder), str(target)]):
        assert tool.main(command) == 1
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1] and options[0].replace("--no-", "--") in said[0] and not target.exists()
    code = tool.main(["inspect", str(folder), *options])
    if expected is None:  # the sizes are not those of the tensors: the next sentence
        assert code == 1 and "misshapen   model.embed_tokens.weight has shape (320, 48)" in capsys.readouterr().out
        return
    assert code == 0 and tool.main(["to-orbax", str(folder), str(target), *options]) == 0
    found: ModelConfig = find_model(target).config
    original = find_model(GOLDEN / golden).config
    assert {name for name in vars(found) if getattr(found, name) != getattr(original, name)} == set(expected)


def test_a_llama_export_comes_back_by_the_programs_own_options(tmp_path, capsys):
    llama, plain, norm = (tmp_path / name for name in ("llama", "plain", "norm"))
    assert tool.main(["to-hf", str(GOLDEN / "rope-tiny"), str(llama), "--layout", "llama"]) == 0
    assert tool.main(["inspect", str(llama)]) == 0
    out = capsys.readouterr().out
    assert "LLaMA's layout" in out and "head        normalised rows" in out and "missing     none" in out
    assert tool.main(["to-orbax", str(llama), str(plain), "--verify"]) == 0
    assert tool.main(["to-orbax", str(llama), str(norm), "--normalize-head"]) == 0
    assert [find_model(path).config.normalize_head for path in (plain, norm)] == [False, True]
    shutil.rmtree(plain)
    assert tool.main(["to-orbax", str(llama), str(plain), "--no-normalize-head"]) == 0
    assert not find_model(plain).config.normalize_head
