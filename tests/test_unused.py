"""Every public function, class, method and constant of bc2_jax is used outside of tests, or documented."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator
from pathlib import Path

from bc2_jax.evaluate.tasks import TASKS

ROOT = Path(__file__).parents[1]
LM_EVAL, REMOVE = "called by lm-eval", "to be removed"
# "module.name" or "module.Class.method" -> why nothing here uses it by name.
ALLOWED = {
    "bc2_jax.evaluate.lm_eval.LmEvalModel.apply_chat_template": LM_EVAL,
    "bc2_jax.evaluate.lm_eval.LmEvalModel.eot_token_id": LM_EVAL,
    "bc2_jax.evaluate.lm_eval.LmEvalModel.get_model_info": LM_EVAL,
    "bc2_jax.evaluate.lm_eval.LmEvalModel.tok_encode": LM_EVAL,
    "bc2_jax.serve.server.Server.handle_exit": "called by uvicorn",
    "bc2_jax.data.streams.Decompressed.readable": "called by io.BufferedReader",
    "bc2_jax.align.demo_preferences.nearness": REMOVE,
    "bc2_jax.align.demo_preferences.fits_language": REMOVE,
    "bc2_jax.curate.storage.Folder.modified": REMOVE,
    "bc2_jax.curate.dense.candidate_pairs": REMOVE,
    "bc2_jax.curate.heuristics.score_heuristics": REMOVE,
    "bc2_jax.curate.embedding.embedder": REMOVE,
    "bc2_jax.serve.requests.Handle.is_complete": REMOVE,
    "bc2_jax.convert.lora_layout.LORA_LAYOUTS": REMOVE,
    "bc2_jax.convert.table.LAYOUTS": REMOVE,
    "bc2_jax.convert.hf_write.FILE_FORMATS": REMOVE,
}
Name = tuple[str, str]
"""A module and a name in it."""


class Uses:
    """What the sources define and use."""

    def __init__(self, root: Path) -> None:
        files = [root / "train.py"]
        files += [
            file for folder in ("bc2_jax", "tools", "configs", "benchmarks") for file in (root / folder).rglob("*.py")
        ]
        self.modules = {
            ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
                file.read_bytes()
            )
            for file in files
        }
        self.names: set[Name] = {tuple(place.split(":")) for place in TASKS.values()}  # type: ignore[misc]  # pairs
        self.attributes: set[str] = set()
        self.strings: set[str] = set()
        origins: dict[Name, Name] = {}
        for module, tree in self.modules.items():
            self._read(module, tree, origins)
        todo = list(self.names)
        while todo:  # a name that a module only imports again is its origin's
            if (origin := origins.get(todo.pop())) is not None and origin not in self.names:
                self.names.add(origin)
                todo.append(origin)

    def _read(self, module: str, tree: ast.Module, origins: dict[Name, Name]) -> None:
        imported: dict[str, Name] = {}
        modules: dict[str, str] = {}
        loaded: set[str] = set()
        dotted: set[tuple[str, str]] = set()
        for statement in tree.body:
            here: set[str] = set()
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    if isinstance(node.ctx, ast.Load):
                        here.add(node.id)
                elif isinstance(node, ast.Attribute):
                    self.attributes.add(node.attr)
                    if isinstance(node.value, ast.Name):
                        dotted.add((node.value.id, node.attr))
                elif isinstance(node, ast.Constant):
                    if isinstance(node.value, str):
                        self.strings.add(node.value)
                elif isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        own = alias.asname or alias.name
                        if f"{node.module}.{alias.name}" in self.modules:
                            modules[own] = f"{node.module}.{alias.name}"
                        else:
                            imported[own] = node.module or "", alias.name
            loaded |= here
            self.names |= {(module, name) for name in here - set(defined(statement))}
        self.names |= {origin for name, origin in imported.items() if name in loaded}
        self.names |= {(modules[name], attribute) for name, attribute in dotted if name in modules}
        origins |= {(module, name): origin for name, origin in imported.items()}


def defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def documented(root: Path) -> set[str]:
    """Identifiers in the code of README.md and docs."""
    text = "\n".join(page.read_text("utf-8") for page in (root / "README.md", *(root / "docs").glob("*.md")))
    code = re.findall(r"```.*?```|`[^`\n]+`|^ {4}.*?$", text, re.DOTALL | re.MULTILINE)
    return {name for span in code for name in re.findall(r"[A-Za-z_]\w*", span)}


def unused(root: Path) -> set[str]:
    """Public names that are neither used nor documented."""
    uses, known = Uses(root), documented(root)
    of_methods = uses.attributes | uses.strings | known
    found = set()
    for module, tree in uses.modules.items():
        if not module.startswith("bc2_jax"):
            continue
        # What loads a module by its name asks it for attributes.
        by_string = uses.attributes if module in uses.strings else set()
        for statement in tree.body:
            for name in defined(statement):
                if (module, name) not in uses.names and name not in known and name not in by_string:
                    found.add((module, name))
            if isinstance(statement, ast.ClassDef):
                methods = (n for n in statement.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
                found |= {(module, f"{statement.name}.{n.name}") for n in methods if n.name not in of_methods}
    return {f"{module}.{name}" for module, name in found if not re.search(r"(^|\.)_", name)}


def test_every_public_name_is_used():
    gc.disable()  # it would take more time than all else
    try:
        found = unused(ROOT)
    finally:
        gc.enable()
    assert sorted(found - set(ALLOWED)) == [], "used by tests at most: remove it, or say in ALLOWED what calls it"
    assert sorted(name for name in set(ALLOWED) - found if ALLOWED[name] != REMOVE) == []


def test_the_reader_sees_every_kind_of_use(tmp_path: Path):
    files = {
        "bc2_jax/a.py": "def direct(): ...\ndef again(): ...\ndef dotted(): ...\ndef unused(): unused()\nLIMIT = 3\n"
        "class C:\n  def called(self): return LIMIT\n  def idle(self): ...\n  def _own(self): ...\n"
        "def named(): ...\ndef only_imported(): ...\n",
        "bc2_jax/b.py": "from bc2_jax.a import again, only_imported\n",
        "train.py": "from bc2_jax import a\nfrom bc2_jax.a import C, direct as d\nfrom bc2_jax.b import again\n"
        "d(), again(), a.dotted(), C().called()\n",
        "README.md": "the function `named(x)`; only_imported is not code\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert unused(tmp_path) == {"bc2_jax.a.unused", "bc2_jax.a.only_imported", "bc2_jax.a.C.idle"}
