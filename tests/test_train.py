"""The command line of train.py."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from bc2_jax.cli.train import without_where_and_how_long

ROOT = Path(__file__).parents[1]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "train.py", *args], cwd=ROOT, capture_output=True, text=True)


def test_a_typo_is_an_error_with_a_suggestion():
    done = run("--optimizer.peak-learning-rat", "1e-3")
    assert done.returncode != 0
    assert "--optimizer.peak-learning-rate" in done.stdout + done.stderr


def test_help_documents_fields():
    done = run("configs/baichuan2_7b.py", "--help")
    assert done.returncode == 0
    for text in ("--optimizer.peak-learning-rate", "Largest global gradient norm", "--checkpoint.save-every"):
        assert text in done.stdout


def test_a_bad_value_is_one_sentence():
    done = run("configs/baichuan2_13b.py", "--mesh.tensor", "16")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    output = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert "mesh.tensor = 16 is not valid" in output and "legal values are 1, 2, 4, 8" in output


def test_missing_rows_are_one_sentence(tmp_path):
    arguments = ("configs/baichuan2_7b.py", "--mesh.num-cpu-devices", "4", "--workdir", str(tmp_path / "run"))
    done = run(*arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "compute.attention = 'flash' is not valid on cpu" in done.stderr
    done = run(*arguments, "--compute.attention", "chunked")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "data.sources.path = 'rows' has no manifest.json" in done.stderr


def test_fine_tuning_needs_a_model():
    done = run("configs/baichuan2_13b_chat.py")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "init_from = None is not valid: fine-tuning needs the base model" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    config = runpy.run_path(str(path))["config"]()
    assert config.name == path.stem


def test_hints_repeat_only_what_is_trained():
    args = ["c.py", "--workdir", "a", "--resume=auto", "--seed", "3", "--num_steps", "5",
            "--num-epochs", "2", "--log-every", "2",
            "--distributed.process-id", "1", "--distributed.num_processes=2"]  # fmt: skip
    assert without_where_and_how_long(args) == ["c.py", "--seed", "3", "--log-every", "2"]
