"""Config files that are wrong in every way that a file can be; each is told in one sentence with file and line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bc2_jax.config import ModelConfig, TrainConfig
from bc2_jax.config.file import read_config_file

ROOT = Path(__file__).parents[1]
SMALL = (
    "from bc2_jax.config import ModelConfig\n"
    "def config():\n"
    "    return ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,\n"
    "                       position_embedding='rope', vocab_size=64)\n"
)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "a config.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


WRONG = {
    "empty": ("", "defines no function config()"),
    "no function": ("config = 5\n", "defines no function config()"),
    "syntax": ("x = 1\ndef config(:\n", "line 2 is not valid Python: invalid syntax."),
    "indentation": ("def config():\nreturn 1\n", "line 2 is not valid Python: expected an indented block"),
    "not UTF-8": (b"x = '\xc4\xe3'\n", " is not valid Python: "),
    "zero bytes": (b"x = 1\0\n", "null bytes"),
    "import": ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'."),
    "name": ("x = 1\ny = z\n", "line 2: NameError: name 'z' is not defined."),
    "arguments": ("def config(x):\n    return x\n", "TypeError: config() missing 1 required positional argument: 'x'."),
    "raises": ("def config():\n\n    return 1 / 0\n", "line 3: ZeroDivisionError: division by zero."),
    "silent": ("def config():\n    assert False\n", "line 2: AssertionError: no message."),
    "field": (SMALL.replace("'rope'", "'ropes'"), "line 3: model.position_embedding = 'ropes' is not valid"),
    "typo": (SMALL.replace("hidden_size=32", "hiden_size=32"), "unexpected keyword argument 'hiden_size'"),
    "nothing": ("def config():\n    pass\n", "config() returns None; it must return a TrainConfig or ModelConfig."),
    "another type": ("def config():\n    return {'a': 1}\n", "config() returns {'a': 1}; it must return a"),
    "the class": ("from bc2_jax.config import ModelConfig\ndef config():\n    return ModelConfig\n", "returns <class"),
    "several lines": ("def config():\n    raise RuntimeError('a\\n  b')\n", "line 2: RuntimeError: a b."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_sentence(tmp_path, name):
    text, message = WRONG[name]
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as found:
        read_config_file(path, TrainConfig, ModelConfig)
    sentence = str(found.value)
    assert sentence.startswith(str(path)) and message in sentence and sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("name", ["missing.py", "."])
def test_what_is_no_file_is_said(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="is not a file: the config must be a Python file"):
        read_config_file(tmp_path / name, TrainConfig)


def test_prepare_completes_the_config(tmp_path):
    change = "import dataclasses\ndef prepare(config):\n    return dataclasses.replace(config, vocab_size=96)\n"
    file = read_config_file(write(tmp_path, SMALL + change), ModelConfig)
    assert file.config.vocab_size == 64 and file.prepare(file.config).vocab_size == 96
    file = read_config_file(write(tmp_path, SMALL), ModelConfig)
    assert file.prepare(file.config) is file.config
    file = read_config_file(write(tmp_path, SMALL + "def prepare(config):\n    pass\n"), ModelConfig)
    with pytest.raises(ValueError, match=r"a config.py: prepare\(\) returns None; it must return a ModelConfig"):
        file.prepare(file.config)


def test_finish_is_told_where_the_run_ended(tmp_path):
    end = "def finish(config, workdir):\n    (workdir / str(config.vocab_size)).touch()\n    raise OSError('full')\n"
    read_config_file(write(tmp_path, SMALL), ModelConfig).finish(None, tmp_path)  # without one, nothing
    file = read_config_file(write(tmp_path, SMALL + end), ModelConfig)
    with pytest.raises(ValueError, match=r"a config.py, line 7: full\."):
        file.finish(file.config, tmp_path)
    assert (tmp_path / "64").is_file()


@pytest.mark.parametrize("program", ["train.py", "tools/aot_compile.py"])
def test_programs_tell_it(tmp_path, program):
    path = write(tmp_path, "import no_such_module\n")
    for config, message in (
        (path, f"error: {path}, line 1: ModuleNotFoundError: No module named 'no_such_module'.\n"),
        (tmp_path / "none", f"error: {tmp_path / 'none'} is not a file: the config must be a Python file that defines"),
    ):
        more = ["--topology", "v5p:2x2x1"] if "aot" in program else []
        command = [sys.executable, program, str(config), *more]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(message)
