"""The configs that come with the program, by name: those of runs and those of curation."""

from __future__ import annotations

from pathlib import Path

from bc2_jax.config.file import first_line, shipped_configs


def run_configs() -> dict[str, Path]:
    """Configs of `bc2 train` and `bc2 estimate`: all but those of curation."""
    return {name: path for name, path in shipped_configs().items() if name not in curation_configs()}


def curation_configs() -> dict[str, Path]:
    """Configs of `bc2 curate`."""
    return shipped_configs("curation")


def list_configs(configs: dict[str, Path]) -> str:
    """A line for each: its name and the first line of its docstring."""
    width = max(map(len, configs))
    return "\n".join(f"{name:{width}}  {first_line(path)}" for name, path in configs.items())
