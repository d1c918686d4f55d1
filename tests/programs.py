"""The programs of bc2_jax/cli, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_program(name: str) -> ModuleType:
    """A new module of bc2_jax/cli/NAME.py; each caller has one of its own, of which it may patch what it likes."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "bc2_jax" / "cli" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program
