"""The wheel, built and installed: its programs from an empty folder, where no checkout is.

pytest tests/wheel. The wheel is installed without what it depends on, which is this environment's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from bc2_jax import __version__

ROOT = Path(__file__).parents[2]
TINY = [
    "--model.hidden-size", "32", "--model.intermediate-size", "64", "--model.num-hidden-layers", "2",
    "--mesh.fsdp", "1", "--mesh.tensor", "1", "--mesh.num-cpu-devices", "1", "--num-steps", "2", "--eval-batches", "1",
    "--verify-resume-steps", "0", "--no-ngram-baselines", "--sample.max-new-tokens", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would leave its folders in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("bc2_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder; beside it a virtual environment with the wheel."""
    top = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(top / "venv")], check=True)
    python = top / "venv" / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env=environment())
    # After the wheel's own place on sys.path; a checkout that is installed there for editing is not taken along.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (top / "empty").mkdir()
    return top / "empty"


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}


def bc2(folder: Path, *args: str, stdin: str = "") -> str:
    program = folder.parent / "venv" / "bin" / "bc2"
    done = subprocess.run(
        [str(program), *args], cwd=folder, env=environment(), input=stdin, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_in_it(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"bc2_jax/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.py")}
    assert configs <= names
    assert {"bc2_jax/py.typed", "bc2_jax/serve/page/index.html", "bc2_jax/align/red_team.json"} <= names
    assert not [name for name in names if name.startswith(("configs", "tests", "tools"))]


def test_the_installed_package_is_the_wheel(folder: Path):
    python = folder.parent / "venv" / "bin" / "python"
    code = "import bc2_jax; print(bc2_jax.__file__); print(bc2_jax.__version__); import importlib.metadata as m; "
    code += "print(m.version('bc2_jax'))"
    done = subprocess.run([str(python), "-c", code], cwd=folder, env=environment(), capture_output=True, text=True)
    place, *versions = done.stdout.splitlines()
    assert Path(place).is_relative_to(folder.parent) and versions == [__version__, __version__]
    assert bc2(folder, "--version").startswith(f"bc2_jax {__version__}\njax ")
    assert "baichuan2_7b" in bc2(folder, "train", "--list")
    assert "usage: bc2 train" in bc2(folder, "train", "baichuan2_7b", "--help")


def test_a_run_is_trained_converted_and_asked(folder: Path):
    said = bc2(folder, "train", "demo", *TINY)
    run = folder / "runs" / "demo"
    assert (run / "checkpoints" / "2").is_dir()
    hint = next(line for line in said.splitlines() if line.startswith("to convert"))
    assert "tools/" not in hint and " to-hf runs/demo/checkpoints/2 " in hint
    bc2(folder, "convert", "to-hf", "runs/demo", "hf")
    assert "parameters" in bc2(folder, "convert", "inspect", "hf")
    assert bc2(folder, "generate", "hf", "--prompt", "却说", "--max-new-tokens", "2").startswith("却说")
    bc2(folder, "chat", "hf", "--max-new-tokens", "2", stdin="你好\n")
