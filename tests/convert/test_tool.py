"""tools/convert.py, there and back through a checkpoint on disk."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bc2_jax.convert import hf
from bc2_jax.convert.hf_config import read_config
from bc2_jax.convert.pretrained import find_model
from bc2_jax.convert.safetensors import write_safetensors
from bc2_jax.terminal import make_console
from tests.programs import load_program

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"

tool = load_program("convert")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5gb", 15 * 10**8), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("7", 7)]
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
    assert find_model(checkpoint).config == read_config(GOLDEN / name)
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
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path} is not a model: it has no config.json and is neither a bc2_jax run nor a checkpoint.\n"
    )
    assert tool.main(["to-orbax", str(GOLDEN / "rope-tiny"), str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} exists; pass --overwrite to replace it.\n"


def run(capsys, *args: object) -> tuple[int, str]:
    code = tool.main([str(arg) for arg in args])
    return code, capsys.readouterr().out


def test_every_layout_is_verified_and_summed_up(tmp_path, capsys):
    code, text = run(capsys, "to-orbax", GOLDEN / "rope-tiny", tmp_path / "a", "--verify", "--strict")
    assert code == 0 and "read back and compared: every tensor is as it was meant to be" in text
    fingerprint = next(line for line in text.splitlines() if line.startswith("parameters sha256"))
    for layout, form in (("baichuan2", "bin"), ("baichuan1", "safetensors"), ("llama", "safetensors")):
        options = ("--dtype", "float32", "--layout", layout, "--format", form, "--verify")
        code, text = run(capsys, "to-hf", tmp_path / "a", tmp_path / layout, *options)
        assert code == 0 and (fingerprint in text) == (layout == "baichuan2")
    code, text = run(capsys, "to-orbax", tmp_path / "baichuan2", tmp_path / "b")
    assert code == 0 and "1 source files have a known checksum, and it is right" in text and fingerprint in text


def test_inspect_and_diff_say_it_by_their_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(tool, "out", make_console())
    code, text = run(capsys, "inspect", GOLDEN / "alibi-tiny")
    assert code == 0 and "because max_position_embeddings is absent" in text and "missing     none" in text
    assert tool.main(["to-hf", str(GOLDEN / "alibi-tiny"), str(tmp_path / "a"), "--dtype", "float16"]) == 0
    capsys.readouterr()
    code, text = run(capsys, "diff", GOLDEN / "alibi-tiny", tmp_path / "a")
    assert code == 1 and "0 of 12 arrays are equal bit for bit" in text and "float32 / float16" in text
    code, text = run(capsys, "diff", tmp_path / "a", tmp_path / "a")
    assert code == 0 and "12 of 12 arrays are equal bit for bit" in text
    tensors = hf.open_folder(tmp_path / "a")
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    (tmp_path / "a" / "model-00001-of-00001.safetensors").unlink()
    shapes = {name: tensor.shape for name, tensor in missing.items()}
    arrays = ((name, np.ones(shape, np.float16)) for name, shape in shapes.items())
    write_safetensors(tmp_path / "a" / "model.safetensors", np.float16, shapes, arrays)
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    code, text = run(capsys, "inspect", tmp_path / "a")
    assert code == 1 and "missing     model.norm.weight" in text


def test_brackets_are_no_markup(tmp_path, capsys):
    shutil.copytree(GOLDEN / "rope-tiny", tmp_path / "a[bold]" / "b[" / "x]")
    code, text = run(capsys, "inspect", tmp_path / "a[bold]" / "b[" / "x]")
    assert code == 0 and str(tmp_path / "a[bold]" / "b[" / "x]") in text


def test_gguf_needs_one_of_the_two_models(tmp_path, capsys):
    assert tool.main(["to-gguf", str(GOLDEN / "rope-tiny"), str(tmp_path / "a.gguf")]) == 1
    assert "error: model.num_hidden_layers = 2 is not valid: llama.cpp's baichuan is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_interrupted(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bc2_jax.convert.stream.Stream.read", interrupt)
    assert tool.main(["to-orbax", str(GOLDEN / "rope-tiny"), str(tmp_path / "a")]) == 130
    assert capsys.readouterr().err.endswith("interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_without_an_accelerator_and_without_unicode(tmp_path):
    """JAX would look for a TPU, of which libtpu prints pages where there is none; the C locale has ASCII alone."""
    target = tmp_path / os.fsdecode("模型 ".encode() + b"\xff")
    program = "import atexit, runpy, sys; sys.argv = sys.argv[1:]; atexit.register(lambda: "
    program += "print('on', sys.modules['jax'].config.jax_platforms)); runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "PYTHONUTF8", "PYTHONIOENCODING")}
    environment |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    words = [ROOT / "tools" / "convert.py", "to-hf", GOLDEN / "rope-tiny", target]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Wrote " in done.stdout and done.stdout.endswith("on cpu\n")
    assert hf.open_folder(target)
