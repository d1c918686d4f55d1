"""Which platform JAX gets, in processes of their own; libtpu's presence changes nothing here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bc2_jax import cpu

CODE = """
import sys
from bc2_jax import cpu
cpu.has_tpu = lambda: False
if sys.argv[1] == "late":
    import jax
chosen = cpu.choose_cpu_without_tpu()
import jax
print(chosen, jax.config.jax_platforms, jax.default_backend())
"""


def run(when: str, **environment: str) -> tuple[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT")}
    inherited |= {"PYTHONPATH": str(Path(cpu.__file__).parents[1]), **environment}
    done = subprocess.run([sys.executable, "-c", CODE, when], env=inherited, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("when", ["early", "late"])
def test_without_a_tpu_jax_takes_the_cpu_in_silence(when):
    assert run(when) == ("True cpu cpu\n", "")


def test_the_users_choice_stays():
    assert run("early", JAX_PLATFORMS="cpu")[0] == "False cpu cpu\n"


def test_a_tpu_is_known_by_its_device_files(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "Path", lambda *parts: tmp_path.joinpath(*(part.lstrip("/") for part in parts)))
    assert not cpu.has_tpu()
    (tmp_path / "dev" / "vfio").mkdir(parents=True)
    (tmp_path / "dev" / "vfio" / "vfio").touch()  # the driver alone, without a device
    assert not cpu.has_tpu()
    (tmp_path / "dev" / "vfio" / "0").touch()
    assert cpu.has_tpu()


@pytest.mark.parametrize("what", ["tpu", "plug-in", "forced"])
def test_nothing_is_chosen_where_there_may_be_more(monkeypatch, what):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(cpu, "has_tpu", lambda: what == "tpu")
    if what == "plug-in":
        monkeypatch.setattr(cpu.importlib.metadata, "entry_points", lambda group: ["cuda"])
    if what == "forced":
        monkeypatch.setenv("JAX_FORCE_TPU_INIT", "1")
    assert not cpu.choose_cpu_without_tpu()
    assert "JAX_PLATFORMS" not in os.environ
