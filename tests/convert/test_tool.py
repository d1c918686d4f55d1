"""tools/convert.py, with a stand-in for bc2_jax.checkpoint: what Orbax does is tested with it."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import bc2_jax
from bc2_jax.convert import hf, table

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools" / "convert.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def stored(monkeypatch) -> dict:
    """Path -> (params, config) of the checkpoints "on disk"."""
    checkpoints: dict = {}
    module = types.ModuleType("bc2_jax.checkpoint")
    module.load_params_for_export = lambda path: (*checkpoints[path], None)
    module.save_params = lambda params, config, path: checkpoints.update({path: (params, config)})
    monkeypatch.setitem(sys.modules, "bc2_jax.checkpoint", module)
    monkeypatch.setattr(bc2_jax, "checkpoint", module, raising=False)
    return checkpoints


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5gb", 15 * 10**8), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("7", 7)],
)
def test_parse_size(text, size):
    assert tool.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "0GB", "5 G B"])
def test_parse_size_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
        tool.parse_size(text)


@pytest.mark.parametrize("name", ["rope-tiny", "alibi-tiny"])
def test_there_and_back(tmp_path, capsys, stored, name):
    checkpoint, out = tmp_path / "ckpt", tmp_path / "out"
    assert tool.main(["to-orbax", str(GOLDEN / name), str(checkpoint)]) == 0
    assert stored[checkpoint][1] == hf.read_config(GOLDEN / name)
    to_hf = ["to-hf", str(checkpoint), str(out), "--dtype", "float32", "--max-shard-size", "100KB"]
    assert tool.main(to_hf) == 0
    expected, got = hf.open_folder(GOLDEN / name), hf.open_folder(out)
    assert got.keys() == expected.keys()
    for key in got:
        np.testing.assert_array_equal(got[key].read(), expected[key].read())
    capsys.readouterr()
    assert tool.main(to_hf) == 1
    assert capsys.readouterr().err == f"error: {out} exists; pass --overwrite to replace it.\n"
    assert tool.main([*to_hf, "--overwrite"]) == 0
    assert len(table.flatten(stored[checkpoint][0])) == len(table.TABLE)


def test_errors_are_one_line(tmp_path, capsys, stored):
    assert tool.main(["to-orbax", str(tmp_path), str(tmp_path / "ckpt")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'config.json'} does not exist.\n"
    assert tool.main(["to-orbax", str(GOLDEN / "rope-tiny"), str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} exists.\n"
