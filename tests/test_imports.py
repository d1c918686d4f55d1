"""The architecture, read from the source: import order, file sizes, who may name a mesh axis."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bc2_jax"
# A module imports only from its own package and from those before it (docs/design.md).
ORDER = (
    "validation", "config", "cpu", "sharding", "tokenizer", "tpu", "kernels", "data", "model", "agreement", "manifest",
    "checkpoint", "convert", "infer", "train", "aot", "align", "evaluate", "curate",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports from bc2_jax, at the top or in a function."""
    parents = ["bc2_jax", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "bc2_jax")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module == "bc2_jax":
                yield from (f"bc2_jax.{alias.name}" for alias in node.names)
            elif module.startswith("bc2_jax."):
                yield module


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_order_covers_the_package():
    assert {top(path) for path in FILES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE or p.stem != "__init__"], ids=str)
def test_imports_only_from_above(path: Path):
    mine = ORDER.index(top(path))
    for name in imported(path):
        parts = name.split(".")
        assert len(parts) > 1, f"{path.name} imports the package itself"
        assert ORDER.index(parts[1]) <= mine, f"{path.name} imports {name}, which stands below it"


def test_the_import_reader_sees_every_form(monkeypatch):
    path = PACKAGE / "model" / "imaginary.py"
    source = (
        "import bc2_jax.curate\nfrom bc2_jax import train\nfrom ..align import dpo\ndef f():\n  from .head import H\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert set(imported(path)) == {"bc2_jax.curate", "bc2_jax.train", "bc2_jax.align", "bc2_jax.model.head"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_are_short_and_named_by_a_noun(path: Path):
    assert len(path.read_text().splitlines()) < 420
    assert not {"utils", "util", "helpers", "common", "misc"} & set(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", [p for p in FILES if top(p) not in ("config", "sharding")], ids=str)
def test_only_sharding_names_mesh_axes(path: Path):
    """A layout is changed in one table. (config.py names the fields of MeshConfig.)"""
    strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    assert not {"fsdp", "fsdp_inner", "context", "tensor"} & {s for s in strings if isinstance(s, str)}
