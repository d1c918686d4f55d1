"""`bc2`: every program is a subcommand, starts fast, says what is wrong, knows the shipped configs, is completed."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

import bc2_jax
from bc2_jax.cli import completion, programs
from bc2_jax.cli.configs import curation_configs, list_configs, run_configs
from bc2_jax.config.file import find_config_file, shipped_configs

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
BASH = shutil.which("bash")
OWN = {"completion", "chat"}
"""Subcommands that are not files in tools/: `bc2 chat` is tools/generate.py --chat."""


def bc2(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bc2_jax", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)


def test_every_tool_is_a_subcommand_and_the_other_way_round():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"train"}
    assert {program.module for name, program in programs.PROGRAMS.items() if name not in OWN} == tools
    modules = {path.stem for path in (ROOT / "bc2_jax" / "cli").glob("*.py")}
    assert {program.module for program in programs.PROGRAMS.values()} <= modules
    for name in tools:
        path = ROOT / "train.py" if name == "train" else ROOT / "tools" / f"{name}.py"
        assert f"from bc2_jax.cli.{name} import main\n" in path.read_text() and len(path.read_text()) < 300


@pytest.mark.parametrize("module", sorted({program.module for program in programs.PROGRAMS.values()}))
def test_every_program_takes_its_arguments(module):
    tree = ast.parse((ROOT / "bc2_jax" / "cli" / f"{module}.py").read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert ast.unparse(main.args) == "argv: Sequence[str] | None=None"


@pytest.mark.parametrize("name", ["convert", "chat", "tokenize", "estimate", "train"])
def test_help_has_the_name_of_the_subcommand(name):
    done = bc2(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: bc2 {name} ")


def test_a_file_of_tools_keeps_its_name():
    command = [sys.executable, str(ROOT / "tools" / "tokenize_corpus.py"), "--help"]
    assert subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT).stdout.startswith(
        "usage: tokenize_corpus.py "
    )
    assert bc2("tokenize-corpus", "--help").stdout.startswith("usage: bc2 tokenize ")


def test_the_list_and_the_versions_come_at_once():
    """CPU time, which other work on the machine does not change, of the fastest of three."""
    for option, said in (("--help", "red-team"), ("--version", f"jax {version('jax')}\nflax {version('flax')}\n")):
        used = []
        for _ in range(3):
            before, start = os.times(), time.monotonic()
            done = bc2(option)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            used.append(min(cpu, time.monotonic() - start))
            assert done.returncode == 0 and said in done.stdout
        assert min(used) < 0.3
    assert bc2("--version").stdout.splitlines()[0] == f"bc2_jax {bc2_jax.__version__}"
    assert bc2("--version").stdout.splitlines()[-1] == f"python {platform.python_version()}"
    code = (
        "import sys; sys.argv = ['bc2', '--help']; from bc2_jax.cli.programs import main; main(); print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT).stdout
    assert not {"jax", "numpy", "rich", "tyro", "flax"} & set(modules.split("\n")[-2].split())


def test_an_unknown_subcommand_is_one_sentence():
    done = bc2("trian")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: bc2 has no subcommand 'trian'; did you mean train?\n"
    assert bc2("zzzz").stderr == "error: bc2 has no subcommand 'zzzz'; bc2 --help lists them.\n"


def test_public_names():
    assert dir(bc2_jax) == sorted(bc2_jax.__all__) and "__version__" in dir(bc2_jax)
    for name in bc2_jax.__all__:
        assert getattr(bc2_jax, name) is not None
    assert (ROOT / "bc2_jax" / "py.typed").is_file()


def test_shipped_configs_have_names_of_their_own():
    files = sorted((ROOT / "configs").rglob("*.py"))
    assert len(files) == len(shipped_configs()) and set(shipped_configs().values()) == set(files)
    assert {"demo", "baichuan2_7b", "tiny_ladder", "paper_h384"} <= set(run_configs())
    assert set(curation_configs()) == {path.stem for path in (ROOT / "configs" / "curation").glob("*.py")}
    assert not set(curation_configs()) & set(run_configs())
    for line in list_configs(shipped_configs()).splitlines():
        assert line.split(maxsplit=1)[1]


def test_a_config_is_given_by_name_or_path(tmp_path, monkeypatch):
    assert find_config_file("demo") == ROOT / "configs" / "demo.py"
    assert find_config_file(ROOT / "configs" / "demo.py") == ROOT / "configs" / "demo.py"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("def config(): ...\n")
    assert find_config_file("demo") == Path("demo")
    with pytest.raises(FileNotFoundError, match="or the name of a config .*; did you mean baichuan2_7b"):
        find_config_file("configs/baichuan2_7.py")


def test_train_and_curate_take_names(tmp_path):
    assert "hidden-size" in bc2("train", "baichuan2_7b", "--help", cwd=tmp_path).stdout
    wrong = bc2("train", "demmo", cwd=tmp_path)
    assert wrong.returncode == 1 and "did you mean demo" in wrong.stderr
    assert bc2("train", "--list").stdout == list_configs(run_configs()) + "\n"
    assert bc2("curate", "--list").stdout == list_configs(curation_configs()) + "\n"
    assert bc2("curate", "x", "--out", "y", "--config", "default", "--help").returncode == 0
    assert "did you mean default" in bc2("curate", "x", "--out", "y", "--config", "defualt").stderr


def test_words_that_complete_a_line():
    assert {"train", "serve"} <= set(completion.complete([""]))
    assert "baichuan2_7b" in completion.complete(["train", "bai"])
    assert "default" in completion.complete(["curate", "x", "--config", ""])
    assert {"to-hf", "inspect"} <= set(completion.complete(["convert", ""]))
    assert "--lora.rank" in completion.complete(["train", "baichuan2_7b_chat", "--"])
    assert {"--slots", "--mesh.tensor"} <= set(completion.complete(["serve", "MODEL", "--"]))
    assert completion.complete(["serve", "MODEL", ""]) == []


@pytest.mark.skipif(BASH is None, reason="it is about bash")
def test_bash_completes(tmp_path):
    """As bash asks for it: the words typed so far, the place of the cursor; a `bc2` stands on PATH."""
    program = tmp_path / "bc2"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m bc2_jax "$@"\n')
    program.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = """
eval "$(bc2 completion bash)"
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _bc2; echo "${COMPREPLY[@]}"; }
ask bc2 pre
ask bc2 train baichuan2_13b_c
ask bc2 convert to-g
ask bc2 convert to-hf --over
complete -p bc2
"""
    done = subprocess.run([BASH, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:4] == ["prepare-chat", "baichuan2_13b_chat", "to-gguf", "--overwrite"]
    assert "-F _bc2 bc2" in lines[4]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell):
    script = bc2("completion", shell).stdout
    assert "train-tokenizer" in script and "SUBCOMMANDS" not in script
    if program := shutil.which(shell):
        assert subprocess.run([program, "-n"], input=script, text=True).returncode == 0
