"""tools/convert.py, there and back through a checkpoint on disk."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.checkpoint import read_model_config
from bc2_jax.convert import hf
from bc2_jax.convert.hf_config import read_config

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools" / "convert.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


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
def test_there_and_back(tmp_path, capsys, name):
    checkpoint, out = tmp_path / "ckpt", tmp_path / "out"
    assert tool.main(["to-orbax", str(GOLDEN / name), str(checkpoint)]) == 0
    assert read_model_config(checkpoint) == read_config(GOLDEN / name)
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


def test_errors_are_one_line(tmp_path, capsys):
    assert tool.main(["to-orbax", str(tmp_path), str(tmp_path / "ckpt")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} has no config.json, and is no run or checkpoint of ours.\n"
    assert tool.main(["to-orbax", str(GOLDEN / "rope-tiny"), str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} exists; pass --overwrite to replace it.\n"
