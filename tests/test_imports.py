"""The architecture, read from the source: import order, sizes, private names, who may name a mesh axis."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bc2_jax"
# A module imports only from its own package and from those before it (docs/design.md).
ORDER = (
    "version", "validation", "files", "config", "cpu", "terminal", "tpu", "sharding", "tokenizer", "kernels", "data",
    "model", "agreement", "manifest", "metadata", "checkpoint", "convert", "infer", "train", "aot", "hardware", "align",
    "evaluate", "curate", "serve", "demo", "cli", "__main__",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]
PROGRAMS = [ROOT / "train.py", *sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])]


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


@pytest.mark.parametrize("path", [p for p in FILES if top(p) not in ("config", "sharding", "cli")], ids=str)
def test_only_sharding_names_mesh_axes(path: Path):
    """A layout is changed in one table. (config.py names the fields of MeshConfig, programs have --tensor.)"""
    strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    assert not {"fsdp", "fsdp_inner", "context", "tensor"} & {s for s in strings if isinstance(s, str)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("bc2_jax") and (path.is_dir() or path.with_suffix(".py").is_file())


def private_names(source: str) -> list[str]:
    """The underscore names of other modules that a file imports, or reaches through a module of bc2_jax."""
    nodes = list(ast.walk(ast.parse(source)))
    found, modules = [], {}  # modules: name in this file -> the module's
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                modules[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)]
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            first, *rest = ast.unparse(node.value).split(".")
            if is_module(module := ".".join([modules.get(first, ""), *rest])):
                found.append(f"{module}.{node.attr}")
    return found


@pytest.mark.parametrize("path", [*FILES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stay_in_their_module(path: Path):
    assert private_names(path.read_text()) == []


def test_the_reader_of_private_names_sees_every_form():
    source = """
import bc2_jax.infer.generate, bc2_jax.convert.hf as layout, os
from bc2_jax import checkpoint as saved
from bc2_jax.agreement import _f
from bc2_jax.kernels.attention import Tokens
def f(self):
    from bc2_jax.model import head
    bc2_jax.infer.generate._a, layout._b.c, saved._d(), head._e
    self._x, Tokens._fields, os._exit, head.Head._y, saved.__name__
"""
    names = {"infer.generate._a", "convert.hf._b", "checkpoint._d", "model.head._e", "agreement._f"}
    assert set(private_names(source)) == {f"bc2_jax.{name}" for name in names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_are_short(path: Path):
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 90] == []


def test_the_path_from_config_to_checkpoint_is_short():
    """What someone reads who wants to know how a run works is listed in docs/design.md."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    _, _, section = design.partition("\n## The path from config to checkpoint\n")
    files = set(re.findall(r"`([\w./-]+\.py)`", section.partition("\n## ")[0]))
    assert 0 < len(files) <= 10
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    assert sum(lines.values()) <= 2400, lines
